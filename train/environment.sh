# Sourced by train/quickstart.sh and tests/run.sh: makes the virtual environment and puts it on PATH.
# usage: source train/environment.sh EXTRAS     (from the repository's root; EXTRAS such as "" or "[test]")
# DSMOE_VENV names the folder (default .venv); PYTHON the interpreter that makes it.

DSMOE_VENV="${DSMOE_VENV:-.venv}"
dsmoe_wanted="$(cat setup.py configs/constraints.txt | cksum | cut -d' ' -f1) $1"
dsmoe_stamp="$DSMOE_VENV/.dsmoe-installed"
if ! grep -qxF "$dsmoe_wanted" "$dsmoe_stamp" 2>/dev/null; then
  echo "== environment in $DSMOE_VENV (a few minutes the first time)"
  [ -x "$DSMOE_VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$DSMOE_VENV"
  # the constraints hold for build environments too: an unpinned torch there would be a CUDA build
  PIP_CONSTRAINT="$PWD/configs/constraints.txt" "$DSMOE_VENV/bin/python" -m pip install --quiet \
    --disable-pip-version-check -e ".$1"
  # extras of these constraints stay installed, whatever was installed for others doesn't
  { grep "^${dsmoe_wanted%% *} " "$dsmoe_stamp" 2>/dev/null || true; echo "$dsmoe_wanted"; } > "$dsmoe_stamp.new"
  mv "$dsmoe_stamp.new" "$dsmoe_stamp"
fi
PATH="$(cd "$DSMOE_VENV/bin" && pwd):$PATH"
export PATH
