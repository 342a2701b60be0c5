# shellcheck shell=bash
# Packages for guests, downloaded into the cache and unpacked there; nothing is installed. Sourced by scripts/vm/store.sh
# and scripts/uml/store.sh. In: $cache, $update. Out: $tools, where fetch_tools puts a root with what a guest needs
# whether or not the machine has it. apt holds the lists to Debian's keys, and what it downloads to the hashes in the lists.

# --- a private state of apt, on the mirror that this machine is set up for ------------------------------------
mkdir -p "$cache"/apt/{lists,archives}/partial "$cache/tools"
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
apt=(-qq -o Dir::Etc::sourcelist="$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
  -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null -o Dir::State::lists="$cache/apt/lists"
  -o Dir::Cache="$cache/apt" -o APT::Sandbox::User=root -o APT::Default-Release="$codename"
  -o Acquire::Languages=none -o Acquire::Retries=3)

# Beside the suites of this machine, for the kernels: the stable releases', and the newest
suites=(bullseye bookworm "$codename-backports" trixie trixie-backports sid)
fetch_lists() {
  [ -z "$update" ] && [ "$(cat "$cache/apt/complete" 2>/dev/null)" = "${suites[*]}" ] && return
  say "fetching the lists of packages"
  local mirror suite keys=/usr/share/keyrings/debian-archive-keyring.gpg
  # $(...) are apt's fields here
  # shellcheck disable=SC2016
  apt-get indextargets --format '$(CREATED_BY) $(ORIGIN) $(LABEL) $(REPO_URI) $(RELEASE) $(COMPONENT)' |
    awk '$1 == "Packages" && $2 == "Debian" { print $3, $4, $5, $6 }' >"$cache/apt/machine"
  mirror=$(awk '$1 == "Debian" { print $2; exit }' "$cache/apt/machine")
  [ -n "$mirror" ] || die "apt knows no Debian mirror: was apt-get update never run?"
  {
    cut -d' ' -f2- "$cache/apt/machine"
    for suite in "${suites[@]}"; do echo "$mirror $suite main"; done
  } | sort -u | sed "s|^|deb [signed-by=$keys] |" >"$cache/apt/sources.list"
  apt-get "${apt[@]}" update || say "some lists could not be had; the others will do"
  [ -n "$(apt-cache "${apt[@]}" pkgnames linux-image-)" ] || die "no list of packages could be had"
  echo "${suites[*]}" >"$cache/apt/complete"
}

newest_of() { # newest_of PACKAGE [BEGINNING]: its newest version in any suite, of those that begin so
  apt-cache "${apt[@]}" madison "$1" | awk -F'|' -v beginning="${2:-}" '
    { gsub(/ /, "", $2) } index($2, beginning) == 1 { print $2 }' | sort --version-sort | tail -n 1
}

unpack() { # unpack FOLDER PACKAGE[/SUITE]...: as on a system whose /bin and /lib are links into /usr
  local into=$1 folder debs package
  shift
  for folder in bin sbin lib lib64; do
    mkdir -p "$into/usr/$folder"
    [ -e "$into/$folder" ] || ln -s "usr/$folder" "$into/$folder"
  done
  debs=$(mktemp -d "$cache/unpack.XXXXXX")
  (cd "$debs" && apt-get "${apt[@]}" download "$@") || { rm -rf "$debs"; return 1; }
  for package in "$debs"/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar --extract --keep-directory-symlink --directory="$into"
  done
  rm -rf "$debs"
}

# --- tools ----------------------------------------------------------------------------------------------------
# The newest udev that goes with this machine's libraries. Its rules of before 255 make no /dev/disk/by-loop-*, and
# so open a device less often than those of today: trixie's are taken instead.
tools=$cache/tools/$codename
fetch_tools() {
  local backports=$codename-backports rules=usr/lib/udev/rules.d/60-persistent-storage.rules
  [ ! -e "$tools/complete" ] || return 0
  fetch_lists
  say "fetching busybox, kmod and udev"
  rm -rf "$tools"
  unpack "$tools" busybox-static kmod libkmod2
  unpack "$tools" "udev/$backports" "libudev1/$backports" 2>/dev/null || unpack "$tools" udev libudev1
  if ! grep -q by-loop "$tools/$rules"; then
    unpack "$tools.newer" udev/trixie
    cp "$tools.newer/$rules" "$tools/$rules"
    rm -rf "$tools.newer"
  fi
  touch "$tools/complete"
}
