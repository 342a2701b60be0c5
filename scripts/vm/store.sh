# shellcheck shell=bash
# Debian's kernels, downloaded once and unpacked into the cache. Sourced by scripts/vm/run.
# In: $cache $kernel $update. Out: $tools (see scripts/guests/packages.sh), $release (the kernel's), $modules (a root
# with its modules), $image (an ELF file) and $initramfs.

mkdir -p "$cache/kernels"
# shellcheck source=scripts/guests/packages.sh
. "$here/../guests/packages.sh"
fetch_tools

# --- kernel: its package or, where it is split, the packages of the same version --------------------------------
newest_wanted() { # of lines with releases; neither the real-time kernels nor those for clouds, which have no 9p
  { grep -E '^[0-9]+\.[0-9]+\.[^ ]*-amd64$' || :; } | { grep -vE -- '-(rt|cloud)-' || :; } |
    while read -r release; do
      case $kernel in newest) echo "$release"; continue ;; esac
      case $release in "$kernel" | "$kernel"[.+-]*) echo "$release" ;; esac
    done | sort --version-sort | tail -n 1
}
elf_of() { # elf_of BZIMAGE: the ELF file in it, which QEMU boots as it is and the guest need not unpack
  local start length packed=$cache/packed
  start=$((($(od -An -tu1 -j497 -N1 "$1") + 1) * 512 + $(od -An -tu4 -j584 -N4 "$1")))
  length=$(od -An -tu4 -j588 -N4 "$1")
  tail -c +$((start + 1)) "$1" | head -c $((length)) >"$packed" || :
  # All of them complain of the four bytes of length that follow
  case $(od -An -tx1 -N4 "$packed") in
    *'fd 37 7a 58') xz --decompress --stdout "$packed" ;;
    *'28 b5 2f fd') zstd --quiet --decompress --stdout "$packed" ;;
    *'02 21 4c 18') lz4 --decompress --stdout "$packed" ;;
    *) gzip --decompress --stdout <"$packed" ;;
  esac 2>/dev/null || :
  rm -f "$packed"
}

release=''
if [ -z "$update" ]; then
  if [ "$kernel" = newest ]; then release=$(cat "$cache/kernels/newest" 2>/dev/null || :)
  else release=$(for mark in "$cache"/kernels/*/complete; do basename "$(dirname "$mark")"; done | newest_wanted); fi
fi
if [ -z "$release" ]; then
  fetch_lists
  release=$(apt-cache "${apt[@]}" pkgnames linux-image- | sed 's/^linux-image-//' | newest_wanted)
  [ -n "$release" ] || die "the mirror has no kernel $kernel"
  [ "$kernel" != newest ] || echo "$release" >"$cache/kernels/newest"
fi
modules=$cache/kernels/$release/root image=$cache/kernels/$release/vmlinux initramfs=$cache/kernels/$release/initramfs
if [ ! -e "$cache/kernels/$release/complete" ]; then
  fetch_lists
  say "fetching kernel $release"
  rm -rf "$cache/kernels/$release"
  # shellcheck disable=SC2046
  unpack "$modules" $(apt-cache "${apt[@]}" pkgnames linux- |
    grep -xE -- "linux-(image|binary|modules|base)-${release//+/\\+}")
  elf_of "$(find "$modules" -name 'vmlinuz*')" >"$image"
  [ "$(head -c 4 "$image" | tail -c 3)" = ELF ] || die "no ELF file was found in kernel $release"
  rm -rf "$modules/boot" "$modules/usr/share"
  PATH=$PATH:/usr/sbin:/sbin depmod --basedir "$modules" "$release"
  touch "$cache/kernels/$release/complete"
fi

# --- initramfs: busybox, the modules on the way to the shares, and init-early ------------------------------------
pack_initramfs() {
  local root module file name number=10
  root=$(mktemp -d "$cache/unpack.XXXXXX")
  mkdir -p "$root"/{bin,dev,proc,sys,modules,layers/{modules,tools,machine,own},root}
  cp "$tools/usr/bin/busybox" "$root/bin/"
  install -m 755 "$here/init-early" "$root/init"
  for module in virtio_pci virtio_console 9pnet_virtio 9p overlay; do
    while read -r file; do
      name=$(basename "${file%.ko*}").ko
      ls "$root/modules/"??-"$name" >/dev/null 2>&1 && continue
      case $file in
        *.xz) xz --decompress --stdout "$file" ;;
        *.zst) zstd --quiet --decompress --stdout "$file" ;;
        *) cat "$file" ;;
      esac >"$root/modules/$((number++))-$name"
    done < <(PATH=$PATH:/usr/sbin:/sbin modprobe --dirname "$modules" --set-version "$release" --show-depends "$module" |
      awk '$1 == "insmod" { print $2 }')
  done
  (cd "$root" && find . | bin/busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$initramfs.new"
  mv "$initramfs.new" "$initramfs"
  rm -rf "$root"
}
if [ ! -e "$initramfs" ] || [ "$here/init-early" -nt "$initramfs" ] || [ "$here/store.sh" -nt "$initramfs" ]; then
  pack_initramfs
fi
