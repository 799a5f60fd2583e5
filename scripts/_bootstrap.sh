# Sourced by scripts/demo and scripts/test: leaves in $PYTHON an environment that has ditrim. With
# STAGE=demo it has what the commands need, otherwise the tools of the tests too.
#
#   DITRIM_ENV=<folder>      use this existing environment as it is; nothing is installed
#   DITRIM_PYTHON=<program>  the Python that .venv is made with (default: the first of python3,
#                            python3.13, python3.12, python3.11 that is new enough)
#
# Otherwise .venv in the checkout is made where it is missing, filled with the versions of
# constraints-cpu.txt, and left alone while pyproject.toml and the constraints stay as they are. An
# environment of the demo gets the rest when a test first needs it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
[ "${STAGE:-}" = demo ] || STAGE=test
PACKAGE="$ROOT"
[ "$STAGE" = demo ] || PACKAGE="$ROOT[dev]"

say() { printf '== %s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${DITRIM_PYTHON:-}" ]; then
    command -v "$DITRIM_PYTHON" >/dev/null 2>&1 ||
      fail "DITRIM_PYTHON=$DITRIM_PYTHON is not a program that can be run"
    is_new_enough "$DITRIM_PYTHON" ||
      fail "DITRIM_PYTHON=$DITRIM_PYTHON is $("$DITRIM_PYTHON" --version 2>&1); ditrim needs Python 3.11 or newer"
    BASE_PYTHON="$DITRIM_PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
      BASE_PYTHON="$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer was found (python3 is $(python3 --version 2>&1 || echo missing));" \
    "install one, or name one with DITRIM_PYTHON=/path/to/python3.12"
}

# What the environment depends on. The folder is part of it: an environment cannot be moved.
fingerprint() {
  { cat "$ROOT/pyproject.toml" "$ROOT/constraints-cpu.txt" && printf '%s\n' "$ROOT" && "$1" --version; } | cksum
}

install_into() {
  local pip=("$1" -m pip --disable-pip-version-check install --progress-bar off)
  # torch goes first and alone: resolved with the rest, a build with CUDA (several GB) could win.
  say "installing the CPU build of torch (about 200 MB) into .venv"
  "${pip[@]}" -c "$ROOT/constraints-cpu.txt" torch >&2 || return 1
  say "installing ditrim and what it needs"
  "${pip[@]}" -c "$ROOT/constraints-cpu.txt" -e "$PACKAGE" >&2 || return 1
}

bootstrap() {
  local env="$ROOT/.venv" stamp stage
  if [ -n "${DITRIM_ENV:-}" ]; then
    PYTHON="$DITRIM_ENV/bin/python"
    [ -x "$PYTHON" ] || fail "DITRIM_ENV=$DITRIM_ENV has no bin/python: give the folder of an environment"
    "$PYTHON" -c 'import ditrim.runtime' >/dev/null 2>&1 ||
      fail "DITRIM_ENV=$DITRIM_ENV does not have ditrim; install it there: $PYTHON -m pip install -e \"$PACKAGE\""
    say "using the environment $DITRIM_ENV"
    return
  fi
  PYTHON="$env/bin/python"
  stamp="$env/ditrim-installed"
  if [ -x "$PYTHON" ] && [ -f "$stamp" ]; then
    for stage in test "$STAGE"; do # an environment of the tests serves the demo too
      if [ "$(cat "$stamp")" = "$stage $(fingerprint "$PYTHON")" ]; then
        say "using the environment .venv"
        return
      fi
    done
  fi
  if command -v nvidia-smi >/dev/null 2>&1; then
    say "this machine has an NVIDIA GPU; .venv gets torch for the CPU all the same, which is enough" \
      "here. To use the GPU, name your own environment with DITRIM_ENV=<folder>"
  fi
  if [ ! -x "$PYTHON" ] || ! is_new_enough "$PYTHON" || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    find_python
    say "making the environment .venv with $("$BASE_PYTHON" --version 2>&1)"
    "$BASE_PYTHON" -m venv --clear "$env" >&2 ||
      fail "$BASE_PYTHON could not make an environment; on Debian and Ubuntu install its venv package" \
        "(python3-venv), or name another Python with DITRIM_PYTHON"
  fi
  rm -f "$stamp"
  install_into "$PYTHON" ||
    fail "packages could not be installed (see above); run this again when the cause is mended," \
      "or name an environment that has them with DITRIM_ENV=<folder>"
  echo "$STAGE $(fingerprint "$PYTHON")" >"$stamp"
}

# One at a time, where the system can lock; a second one waits and finds the work done.
exec 9<"$ROOT"
if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
  say "waiting for another run to finish its environment"
  flock 9
fi
bootstrap
exec 9>&-
