"""Build hook: compiles the FUSE extension into the wheel, or beside its source for an editable install.

It is optional: without a compiler, pkg-config or the headers of libfuse the installation goes on, and mounts work
without it.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "client/promisefs_client/fuse"


def _builder(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", root / PACKAGE / "fuse_extension_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FuseExtensionHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        builder = _builder(Path(self.root))
        editable = version == "editable"
        self._directory = tempfile.TemporaryDirectory(prefix="promisefs-build-")
        target = builder.BUILT if editable else Path(self._directory.name) / builder.BUILT.name
        try:
            builder.build(target)
        except builder.CannotBuild as error:
            self.app.display_warning(f"the FUSE extension is not built, mounts will work without it: {error}")
            return
        if not editable:
            build_data["force_include"][str(target)] = f"{PACKAGE.partition('/')[2]}/{target.name}"
        # For any Python, but for this machine's kind only.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._directory.cleanup()
