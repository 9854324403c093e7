# Sourced by scripts/quickstart and scripts/test: finds Python, makes .venv, installs when pyproject.toml changed.
# Every failure is one sentence on stderr and exit code 2.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# The first interpreter that runs, is new enough and can make environments. A pyenv shim may exist and yet not run.
find_python() {
  local candidate newest="" without_venv=""
  for candidate in python3.13 python3.12 python3.11 python3 python3.14; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'pass' >/dev/null 2>&1 || continue
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      newest="$candidate is $("$candidate" -c 'import platform; print(platform.python_version())')"
    elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      without_venv=$candidate
    else
      echo "$candidate"
      return
    fi
  done
  if [ -n "$without_venv" ]; then
    fail "$without_venv cannot make virtual environments; install its venv module (Debian, Ubuntu: sudo apt install $without_venv-venv) and run this again."
  fi
  fail "jaxserve needs Python 3.11 or newer (${newest:-no python3 on the PATH}); install one, from python.org or your package manager, and run this again."
}

need_disk() { # need_disk MEGABYTES
  local free_mb
  free_mb=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1024) }')
  if [ "$free_mb" -lt "$1" ]; then
    fail "the installation needs about $1 MB and $root has $free_mb MB free; make room and run this again."
  fi
}

make_venv() {
  # A half-made environment (Ctrl-C during the first run) has no working pip: make it again over the remains.
  if "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "$venv was made with $("$python" -V), jaxserve needs 3.11 or newer; remove that folder and run this again."
    return
  fi
  local base
  base=$(find_python) || exit 2
  echo "Making $venv with $("$base" -V) ..." >&2
  "$base" -m venv "$venv" || fail "'$base -m venv $venv' failed (see above); remove that folder and run this again."
}

# install EXTRAS MEGABYTES: installs ".[EXTRAS]" unless that was done for this very pyproject.toml.
install() {
  local wanted stamp=$venv/.installed${1:+-$1} log=$venv/install.log
  wanted=$(cksum <"$root/pyproject.toml")
  if [ -x "$venv/bin/jaxserve" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  need_disk "$2"
  make_venv
  echo "Installing jaxserve${1:+ and its $1 tools} into $venv (once; a minute or two) ..." >&2
  if ! "$python" -m pip install --disable-pip-version-check --quiet --editable "$root${1:+[$1]}" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    fail "pip could not install jaxserve; the lines above are its last (all: $log); it needs the network to reach pypi.org."
  fi
  echo "$wanted" >"$stamp"
  echo "$wanted" >"$venv/.installed" # every extra includes the core
}
