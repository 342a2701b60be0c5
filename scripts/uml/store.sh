# shellcheck shell=bash
# Kernels for user-mode Linux, in the cache: Debian's ready ones unpacked, or built from Debian's source. Sourced by
# scripts/uml/run. In: $cache, $kernel, $update. Out: $tools (see scripts/guests/packages.sh), $linux (the program),
# $modules (a root with its modules), $preload (what is preloaded into it, or nothing) and $seccomp (1 where it can hold
# its processes by seccomp).

# shellcheck source=scripts/guests/packages.sh
. "$here/../guests/packages.sh"

version=${kernel%%-*} variant=${kernel#"${kernel%%-*}"} variant=${variant#-}
folder=$cache/uml/kernels/$kernel
linux=$folder/linux modules=$folder/root
mkdir -p "$cache/uml/kernels"

take_package() { # take_package VERSION: Debian's own kernel
  local fresh=$folder.new libc=$cache/uml/libc libraries
  unpack "$fresh/package" "user-mode-linux=$1"
  mkdir -p "$fresh/root/usr/lib/modules"
  ln -s usr/lib "$fresh/root/lib"
  mv "$fresh/package/usr/bin/linux.uml" "$fresh/linux"
  mv "$fresh"/package/usr/lib/uml/modules/* "$fresh/root/usr/lib/modules/"
  rm -rf "$fresh/package"
  PATH=$PATH:/usr/sbin:/sbin depmod --basedir "$fresh/root" "$(ls "$fresh/root/usr/lib/modules")"
  "$fresh/linux" --version >/dev/null 2>&1 && return
  # It wants a newer C library than the machine's: trixie's lies beside it
  libraries=$libc/usr/lib/x86_64-linux-gnu
  [ -e "$libraries/libc.so.6" ] || unpack "$libc" libc6/trixie
  patchelf --set-interpreter "$libraries/ld-linux-x86-64.so.2" --set-rpath "$libraries" "$fresh/linux"
}

fetch_source() { # fetch_source PACKAGE=VERSION: into $source; the sources of Debian's kernels are one archive in a package
  rm -rf "$source"
  mkdir -p "$source.package" "${source%/*}"
  (cd "$source.package" && apt-get "${apt[@]}" download "$1")
  dpkg-deb --fsys-tarfile "$source.package"/*.deb |
    tar --extract --to-stdout --wildcards '*/linux-source-*.tar.xz' | xz --decompress --threads=0 |
    tar --extract --directory="${source%/*}"
  rm -rf "$source.package"
  echo "$1" >"$source/.package"
}

# A version is built in one place, whichever variant: what the variants have in common is compiled once.
build() { # build PACKAGE=VERSION
  local source=$cache/uml/source/linux-source-$version objects=$cache/uml/objects/$version fresh=$folder.new
  local fragments=("$here/config") make=(nice make -s -j"$(nproc)" -C)
  [ "$(cat "$source/.package" 2>/dev/null)" = "$1" ] || { rm -rf "$objects"; fetch_source "$1"; }
  [ -z "$variant" ] || fragments+=("$here/config-$variant")
  mkdir -p "$objects" "$fresh/root/usr/lib"
  ln -s usr/lib "$fresh/root/lib"
  make+=("$source" ARCH=um "O=$objects")
  "${make[@]}" x86_64_defconfig
  (cd "$source" && scripts/kconfig/merge_config.sh -m -O "$objects" "$objects/.config" "${fragments[@]}") >/dev/null
  "${make[@]}" olddefconfig
  "${make[@]}" linux modules
  "${make[@]}" "INSTALL_MOD_PATH=$fresh/root" modules_install >/dev/null
  rm -f "$fresh"/root/usr/lib/modules/*/{build,source}
  cp "$objects/linux" "$fresh/"
  cp "$objects/.config" "$fresh/config"
  strip --strip-debug "$fresh/linux"
}

# What lies in the cache is what was put there: `complete` has the hashes of all of it.
is_complete() { (cd "$folder" && sha256sum --check --quiet complete) >/dev/null 2>&1; }

fill() {
  local package='' source_package=linux-source-$version
  [ -z "$variant" ] || [ -e "$here/config-$variant" ] || die "there is no variant $variant"
  fetch_lists
  [ -n "$variant" ] || package=$(newest_of user-mode-linux "${version}um")
  rm -rf "$folder.new"
  mkdir -p "$folder.new"
  if [ -n "$package" ]; then
    say "fetching kernel $kernel: user-mode-linux $package"
    take_package "$package"
  else
    package=$(newest_of "$source_package")
    [ -n "$package" ] || die "the mirror has neither user-mode-linux nor $source_package of $version"
    node "$here/../setup.js" --check --for kernel-build >/dev/null || exit 125
    say "building kernel $kernel from $source_package $package, which takes minutes"
    build "$source_package=$package"
  fi
  (cd "$folder.new" && find . -type f -exec sha256sum {} +) >"$folder.complete"
  mv "$folder.complete" "$folder.new/complete"
  rm -rf "$folder"
  mv "$folder.new" "$folder"
}

if [ -n "$update" ] || [ ! -e "$tools/complete" ] || ! is_complete; then
  # One process at a time fills the cache; what is there is used meanwhile.
  exec 9>"$cache/lock"
  flock --timeout 3600 9 || die "the cache is being filled by somebody else for an hour"
  fetch_tools
  if [ -n "$update" ] || ! is_complete; then fill; fi
  exec 9>&-
fi

seccomp='' preload=''
if grep -qa 'Invalid seccomp option' "$linux"; then seccomp=1
else
  preload=$cache/uml/xstate.so
  if [ ! -e "$preload" ] || [ "$here/xstate.c" -nt "$preload" ]; then
    cc -shared -fPIC -O2 -Wall -Wextra -Werror -o "$preload.new" "$here/xstate.c"
    mv "$preload.new" "$preload"
  fi
fi
