#!/bin/sh
# Make .venv ready: `make setup` calls this. Says what it does; safe to repeat, and quick when nothing changed.
#
#   PYTHON=python3.12   which Python (3.10 to 3.13) to build .venv with; else the first fitting one found
#   EXTRAS=a,b          which parts, see [options.extras_require] of setup.cfg; else all for one machine without a GPU
#   CI=true             what is missing on the machine is an error, not a smaller set-up
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.set-up
WANTED=${EXTRAS:-producers,detector,trainer,peers,dev}
CI=${CI:-false}

say() { printf '%s\n' "$*"; }
missing() {
    say ""
    say "MISSING: $1"
    say "  left out: $2"
    say "  install:  $3"
    say ""
    if [ "$CI" = true ]; then
        say "CI=true: nothing may be left out."
        exit 1
    fi
}
fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

# 1. Python
python=
if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 || { say "PYTHON=$PYTHON is not there."; exit 1; }
    fits "$PYTHON" || { say "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); it takes Python 3.10 to 3.13."; exit 1; }
    python=$PYTHON
else
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then python=$candidate; break; fi
    done
fi
if [ -z "$python" ]; then
    say "MISSING: Python 3.10 to 3.13."
    say "  install:  sudo apt-get install python3 python3-venv      (or: make setup PYTHON=/path/to/python3.12)"
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    say "MISSING: the venv module of $("$python" --version)."
    say "  install:  sudo apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    exit 1
fi

# 2. What only the machine can bring
if [ -z "${EXTRAS:-}" ]; then
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if printf '#include <Python.h>\n#include <portaudio.h>\n' | ${CC:-cc} -E -I"$include" - >/dev/null 2>&1; then
        WANTED=$WANTED,microphone
    else
        headers="portaudio19-dev gcc libc6-dev"
        [ -e "$include/Python.h" ] || headers="$headers python3-dev"
        missing "the PortAudio headers, a C compiler or the Python headers" \
            "\`producers mic\` and \`producers devices\` (live microphones); all else works" \
            "sudo apt-get install $headers && make setup"
    fi
fi
if ! java -version >/dev/null 2>&1 || ! mvn -v >/dev/null 2>&1; then
    missing "Java (17 or later) or Maven" \
        "the tests against a real Kafka broker; the detector itself needs neither" \
        "sudo apt-get install default-jre-headless maven"
fi

# 3. The packages
state="$("$python" -c 'import sys; print(sys.version, sys.base_prefix)') $WANTED $(cksum setup.cfg pyproject.toml deploy/setup.sh)"
if [ -x $VENV/bin/python ] && [ -f $STAMP ] && [ "$(cat $STAMP)" = "$state" ]; then
    say "Set-up is up to date ($VENV, $WANTED)."
    exit 0
fi
rm -f $STAMP
wanted_version=$("$python" -c 'import sys; print(sys.version)')
if [ "$($VENV/bin/python -c 'import sys; print(sys.version)' 2>/dev/null || true)" != "$wanted_version" ] ||
    ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then
    say "[1/2] Making $VENV with $("$python" --version)"
    "$python" -m venv --clear $VENV
else
    say "[1/2] Keeping $VENV ($("$python" --version))"
fi
say "[2/2] Installing $WANTED: about 600 MB to download the first time, 2 GB on disk, a few minutes"
$VENV/bin/python -m pip install --disable-pip-version-check --no-input -e ".[$WANTED]"
printf '%s\n' "$state" >$STAMP
say "Set-up is done."
