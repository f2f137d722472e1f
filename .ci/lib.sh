# Shared by .ci/setup and .ci/setup-vllm; sourced from the repository's root.

export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

log=.cache/logs/setup.log

say() { printf '[setup] %s\n' "$*"; }

die() {
  printf '[setup] %s\n' "$*" >&2
  exit 1
}

# unchanged STAMP KEY: true if the step behind STAMP was done with this KEY.
unchanged() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# digest TEXT FILE...: one key for a text and the contents of files.
digest() {
  local text=$1
  shift
  { printf '%s\n' "$text"; cat -- "$@"; } | sha256sum | cut -d ' ' -f 1
}

# pip_install ARGUMENT...: pip's output goes to the log; every 20th package is counted aloud.
pip_install() {
  mkdir -p "${log%/*}"
  .venv/bin/python -m pip install --no-deps "$@" 2>&1 | tee "$log" | count
}

count() {
  local line collected=0
  while IFS= read -r line; do
    case $line in
      Collecting* | Processing*)
        collected=$((collected + 1))
        ((collected % 20)) || say "  $collected packages found"
        ;;
      'Installing collected packages'*) say '  unpacking them' ;;
    esac
  done
}

# install WHAT ARGUMENT...: pip_install, or the end of pip's log and the reason it matters.
install() {
  local what=$1
  shift
  say "installing $what"
  pip_install "$@" || {
    tail -n 15 "$log" >&2
    die "pip could not install $what; all it said is in $log"
  }
}
