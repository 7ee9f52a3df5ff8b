# A fresh Debian 12 to try packages in: sourced by deploy/chroot-check and deploy/boot-check, which run as root.
#
# The base system is made once by debootstrap, and kept in /var/tmp/shoal-bookworm; each run works in an overlay on it.
base=${SHOAL_CHROOT_BASE:-/var/tmp/shoal-bookworm}

need() {
  [ "$(id -u)" = 0 ] || { echo "$0 makes a chroot: run it as root" >&2; exit 2; }
  for tool in "$@"; do
    command -v "$tool" >/dev/null || { echo "$tool is not here: apt-get install debootstrap util-linux systemd-container" >&2; exit 2; }
  done
}

newest() { # FOLDER NAME: the package that was built last
  ls -t "$1/$2"_*_"$(dpkg --print-architecture)".deb | head -n 1
}

fresh_debian() { # sets $work and $root; what is mounted goes with the script
  if [ ! -e "$base/.made" ]; then
    echo "making a Debian 12 in $base …"
    rm -rf "$base"
    debootstrap --variant=minbase bookworm "$base" >"$base.log" 2>&1 || { tail -n 20 "$base.log" >&2; exit 1; }
    touch "$base/.made"
  fi
  work=$(mktemp -d /var/tmp/shoal-check.XXXXXX)
  root=$work/root
  mkdir "$work/over" "$work/scratch" "$root"
  mount -t overlay overlay -o "lowerdir=$base,upperdir=$work/over,workdir=$work/scratch" "$root"
  trap clean EXIT
  mount -t proc proc "$root/proc"
  mount --rbind --make-rslave /dev "$root/dev"
  # How this machine reaches Debian's packages; nothing of it is part of what is checked.
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  cp -r /etc/apt/apt.conf.d/. "$root/etc/apt/apt.conf.d/"
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
  chmod 755 "$root/usr/sbin/policy-rc.d"
  in_root apt-get update -qq
}

clean() {
  umount --recursive --lazy "$root/proc" "$root/dev" 2>/dev/null || true
  [ -n "${KEEP:-}" ] && { echo "kept: $root" >&2; return; }
  umount --recursive --lazy "$root" || true
  rm -rf "$work"
}

in_root() {
  env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive chroot "$root" "$@"
}

later() { # PACKAGE.deb TARGET.deb: the same package with a later version
  local folder=$work/later
  rm -rf "$folder"
  dpkg-deb -R "$1" "$folder"
  sed -i 's/^Version: .*/&+later/' "$folder/DEBIAN/control"
  dpkg-deb --root-owner-group -Znone --build "$folder" "$2" >/dev/null
  rm -rf "$folder"
}

fail() {
  echo "FAILED: $*" >&2
  exit 1
}
