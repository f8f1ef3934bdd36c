# Runs its arguments with the first Python that is new enough, or says in one line what to do.
# $PYTHON names the only one to try. POSIX sh, because the python3 at hand may be too old, or none.

# Another project's settings must not decide what is imported here.
unset PYTHONHOME PYTHONPATH PYTHONSAFEPATH

suits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [ -n "$PYTHON" ]; then
    suits "$PYTHON" && exec "$PYTHON" "$@"
    echo "PYTHON=$PYTHON is not a Python 3.11 or newer: name one that is, or leave PYTHON out." >&2
    exit 2
fi

for python in python3 python3.14 python3.13 python3.12 python3.11 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-9]*/bin/python3; do
    suits "$python" && exec "$python" "$@"
done

found=$(python3 -c 'import sys; print("python3 here is %d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
echo "sdlisten needs Python 3.11 or newer (${found:-no python3 here runs}): install one (Debian 12 or newer:" \
    "apt install python3 python3-venv; elsewhere: pyenv install 3.13), or name one: make PYTHON=/path/to/python3 …" >&2
exit 2
