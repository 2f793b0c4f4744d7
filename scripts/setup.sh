#!/usr/bin/env bash
# Make .venv ready: system packages, virtual environment, the project itself (editable, with extras client and dev).
#
#   scripts/setup.sh [--tests] [--plot]     --tests also asks for the tools that only the test suite uses,
#                                           --plot for the extra "plot" (matplotlib)
#
# Silent and quick if nothing changed. Any number of runs may go on at once: one works, the others wait.
# PYTHON=... chooses the interpreter: if .venv has another one it is made anew. Otherwise .venv keeps the one it has;
# a new one gets the first that is complete (>= 3.11, with headers and ensurepip).
#
# Exit status: 0 ready
#              3 system packages are missing and may not be installed from here: the command to run is printed
#              4 no Python >= 3.11 that can be used
#              5 the virtual environment or the project could not be installed: the end of the log is printed
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp_file=$venv/.setup-stamp
log=$root/build/setup.log

# Debian's packages, with the command in each where that has another name.
tools=()
extras=client,dev
for option in "$@"; do
    case $option in
        --tests) tools=(git make rsync sqlite3 iproute2:ip nftables:nft) ;;
        --plot) extras=client,dev,plot ;;
    esac
done

say() { printf 'setup: %s\n' "$*" >&2; }
# Some of Debian's tools are where only root looks for programs.
have() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1; }

# Everything that decides what ends up in .venv. The path is part of it: editable installs do not survive a move.
wanted_stamp() { printf '%s %s\n' "$(cat "$root/pyproject.toml" "$root/scripts/setup.sh" "$root"/client/promisefs_client/fuse/fuse_extension{.c,_build.py} | sha256sum | cut -d' ' -f1)" "$root"; }

venv_is_current() {
    [[ -x $venv/bin/python && -f $stamp_file && $(<"$stamp_file") == "$(wanted_stamp)" ]] &&
        { [[ -z ${PYTHON:-} ]] || venv_is_of "$(probe_python "$PYTHON" | cut -d' ' -f4-)"; } &&
        { [[ $extras != *plot* ]] || "$venv/bin/python" -c 'import matplotlib' 2>/dev/null; }
}

# Whether .venv has this interpreter: the path that probe_python prints.
venv_is_of() { [[ -n $1 && $(realpath -q "$venv/bin/python") == "$1" ]]; }

# Names of the Debian packages for what is missing besides Python.
missing_system_packages() {
    have fusermount3 || echo fuse3
    have pkg-config || echo pkg-config
    pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
    if ! have cc; then
        echo gcc
        echo libc6-dev
    elif ! echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1; then
        echo libc6-dev
    fi
    local tool
    for tool in ${tools[@]+"${tools[@]}"}; do have "${tool#*:}" || echo "${tool%:*}"; done
}

# Print "X.Y headers ensurepip path" (the middle two yes or no) for an interpreter >= 3.11; fail for any other.
probe_python() {
    "$1" - 2>/dev/null <<'PROBE'
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(1)
headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
ensurepip = importlib.util.find_spec("ensurepip") is not None
answer = {True: "yes", False: "no"}
print("%d.%d" % sys.version_info[:2], answer[headers], answer[ensurepip], os.path.realpath(sys.executable))
PROBE
}

no_python() {
    say "no usable Python >= 3.11${PYTHON:+ (PYTHON=$PYTHON)} with its headers and ensurepip; install one and name it: PYTHON=/path/to/python3 $0"
    exit 4
}

# Set python (path, or empty) and python_packages (what it lacks).
find_python() {
    python='' python_packages=()
    local incomplete='' candidate facts version headers ensurepip path
    local candidates=("$venv/bin/python" python3 python3.{14,13,12,11} /usr/bin/python3)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        have "$candidate" || continue
        facts=$(probe_python "$candidate") || continue
        read -r version headers ensurepip path <<<"$facts"
        if [[ $headers == yes && $ensurepip == yes ]]; then
            python=$path
            return
        fi
        [[ -n $incomplete ]] || incomplete=$facts
    done
    if [[ -z $incomplete && -n ${PYTHON:-} ]]; then no_python; fi
    if [[ -z $incomplete ]]; then
        python_packages=(python3 python3-venv python3-dev)
        return
    fi
    read -r version headers ensurepip path <<<"$incomplete"
    [[ $headers == yes ]] || python_packages+=("python$version-dev")
    [[ $ensurepip == yes ]] || python_packages+=("python$version-venv")
    # Only the distribution's own interpreter is built for the plain names, and those exist everywhere.
    if [[ $path == "$(realpath -q /usr/bin/python3 || true)" ]]; then
        python_packages=("${python_packages[@]/#python$version-/python3-}")
    fi
}

install_packages() {
    local as_root=()
    local command=(apt-get install -y --no-install-recommends "$@")
    if ! have apt-get; then
        say "these are missing (Debian's names): $*"
        say "install them with this system's package manager, then run this again"
        exit 3
    fi
    if [[ $(id -u) != 0 ]]; then
        if have sudo && sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        else
            say "system packages are missing. Run this, then try again:"
            printf '    sudo apt-get update && sudo %s\n' "${command[*]}" >&2
            exit 3
        fi
    fi
    say "installing system packages: $*"
    local options=(-q -o DPkg::Lock::Timeout=300)
    {
        ${as_root[@]+"${as_root[@]}"} apt-get "${options[@]}" update &&
            ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive "${command[@]}" "${options[@]:1}"
    } >>"$log" 2>&1 </dev/null || {
        tail -n 15 "$log" >&2
        say "apt-get failed (all of it: $log). Run this, then try again:"
        printf '    apt-get update && %s\n' "${command[*]}" >&2
        exit 3
    }
}

install_failed() {
    tail -n 25 "$log" >&2
    say "$1 (all of it: $log)"
    exit 5
}

build_venv() {
    local version
    version=$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")')
    if ! venv_is_of "$python" || ! "$venv/bin/python" -c "import sys, pip; sys.exit(sys.prefix != '$venv')" 2>/dev/null; then
        say "making .venv with Python $version"
        "$python" -m venv --clear "$venv" >>"$log" 2>&1 || install_failed "the virtual environment could not be made"
    fi
    say "installing promisefs and what it needs into .venv (a minute or so)"
    (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check -e ".[$extras]") \
        >>"$log" 2>&1 </dev/null || install_failed "pip could not install the project"
    wanted_stamp >"$stamp_file.new"
    mv "$stamp_file.new" "$stamp_file"
}

mapfile -t missing < <(missing_system_packages)
if [[ ${#missing[@]} == 0 ]] && venv_is_current; then exit 0; fi

mkdir -p "$root/build"
exec 9>"$root/build/setup.lock"
if ! flock -n 9; then
    say "another run is setting up; waiting for it"
    flock 9
fi
: >"$log"

mapfile -t missing < <(missing_system_packages)
if venv_is_current; then python_packages=(); else find_python; fi
if [[ ${#missing[@]} -gt 0 || ${#python_packages[@]} -gt 0 ]]; then
    install_packages ${missing[@]+"${missing[@]}"} ${python_packages[@]+"${python_packages[@]}"}
fi
if ! venv_is_current; then
    find_python
    [[ -n $python ]] || no_python
    build_venv
    say "ready"
fi
