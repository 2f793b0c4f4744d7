"""Operations on volumes as a whole that come from a mount."""

from __future__ import annotations

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import Empty, SetVolumeStatus
from promisefs_protocol.transport import Reply

from promisefs_server.identity.caller import Caller

from .parts import Operation, Operations


class VolumeOperations(Operations):
    def table(self) -> dict[type, Operation]:
        return {SetVolumeStatus: self.set_volume_status}

    def set_volume_status(self, caller: Caller, request: SetVolumeStatus, bulk: bytes | None) -> Reply:
        if not caller.identity.administrator:
            raise Aborted(AbortCode.ACCES, "only administrators set quotas")
        volume = self._store.volumes.get(request.volume)
        self._store.volumes.set_quota(volume.name, request.quota)
        return Empty(), None
