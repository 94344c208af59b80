# Sourced first: --help prints the comment at the head of the started script, and the Python scripts that have its options.
for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        grep -o '[A-Za-z0-9_-]*/[A-Za-z0-9_/-]*[.]py' "$0" | sort -u | sed 's/.*/Options: python & --help/' || true # none
        exit 0
    fi
done
