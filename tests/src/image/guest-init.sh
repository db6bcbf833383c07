#!/bin/sh
# First process of a test guest: loads modules, tells what it sees, does what the kernel command line asks.
#   vmm.modules=a,b   load more modules (and what they depend on)
#   root=/dev/X       go on with the system on that disk instead (its own init is told nothing; rootflags=, ro are honoured)
#   vmm.run=BASE64    run this shell script; a disk that begins with the line #!VMMRUN is such a script, too
#   vmm.action=poweroff|reboot|shell|wait    then do this (default: poweroff)
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp

load() {
    [ -e "/modules/$1.order" ] || return 0
    for module in $(cat "/modules/$1.order"); do
        [ -d "/sys/module/$module" ] || insmod "/modules/$module.ko"
    done
}

action=poweroff root= script= flags= mode=-w
for word in $(cat /proc/cmdline); do
    case $word in
        vmm.modules=*) modules=$(echo "${word#*=}" | tr , ' ') ;;
        vmm.action=*) action=${word#*=} ;;
        vmm.run=*) script=${word#*=} ;;
        root=*) root=${word#*=} ;;
        rootflags=*) flags=${word#*=} ;;
        ro) mode=-r ;;
    esac
done
for module in virtio_pci virtio_blk virtio_console virtio_net virtio_rng $modules; do
    load "$module"
done
# The console may be a device of a module that was just loaded.
exec </dev/console >/dev/console 2>&1
# From here on only this script writes to the console.
echo 1 >/proc/sys/kernel/printk

if [ -n "$root" ]; then
    tries=0
    until [ -b "$root" ] || [ $tries -ge 50 ]; do sleep 0.1; tries=$((tries + 1)); done
    mkdir -p /root
    if mount -t ext4 $mode ${flags:+-o "$flags"} "$root" /root; then
        mount --move /dev /root/dev
        mount --move /proc /root/proc
        mount --move /sys /root/sys
        mount --move /run /root/run
        exec switch_root /root /sbin/init
    fi
    echo "VMM-TEST: error=cannot-mount-$root"
fi

. /report.sh
report

if [ -n "$script" ]; then
    echo "$script" | base64 -d >/run/script
    sh /run/script
    echo "VMM-TEST: run-status=$?"
fi
for disk in /sys/block/*; do
    disk=/dev/${disk##*/}
    if [ -b "$disk" ] && [ "$(head -c 8 "$disk" 2>/dev/null | tr -d '\0')" = '#!VMMRUN' ]; then
        tr -d '\0' <"$disk" >/run/disk-script
        sh /run/disk-script
        echo "VMM-TEST: run-status=$?"
    fi
done
echo "VMM-TEST: action=$action"
case $action in
    reboot) reboot -f ;;
    shell) setsid -c sh -l; poweroff -f ;;
    wait) ;;
    *) poweroff -f ;;
esac
while :; do sleep 3600; done
