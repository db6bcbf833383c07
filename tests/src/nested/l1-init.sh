#!/bin/sh
# First process of L1, the machine inside QEMU that offers a KVM: mounts the host's root, runs one command in it, tells its exit
# status in a file and on the console, and powers off. Words of the kernel command line:
#   vmm.work=BASE64   the folder (a path of the host) with command.sh; stdout, stderr, ready, alive and status are made there
#   vmm.tmp=host      the host's /tmp is seen instead of an empty one
#   vmm.tty=1         the command talks to the console instead of files
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm

work= tmp= tty=
for word in $(cat /proc/cmdline); do
    case $word in
        vmm.work=*) work=$(echo "${word#*=}" | base64 -d) ;;
        vmm.tmp=*) tmp=${word#*=} ;;
        vmm.tty=*) tty=${word#*=} ;;
    esac
done

stop() {
    echo "VMM-L1: $1"
    sync
    poweroff -f
    sleep 60
}

mount -t virtiofs host /host || stop "cannot mount the host's root"
[ -r "/host$work/command.sh" ] || stop "no command in $work"
mount --rbind /dev /host/dev
mount -t proc proc /host/proc
mount -t sysfs sysfs /host/sys
mount -t tmpfs -o mode=755 tmpfs /host/run
[ "$tmp" = host ] || mount -t tmpfs -o mode=1777 tmpfs /host/tmp
for order in /modules/*.order; do
    for module in $(cat "$order"); do
        [ -d "/sys/module/$module" ] || insmod "/modules/$module.ko" || echo "VMM-L1: no module $module"
    done
done
[ -c /dev/kvm ] || stop "no /dev/kvm"
hostname l1
ip link set lo up
ulimit -n 65536
: >"/host$work/ready"
# A machine that stands still does not grow this file.
while sleep 5; do echo >>"/host$work/alive"; done &
echo "VMM-L1: ready"
if [ -n "$tty" ]; then
    # The terminal is the caller's: no kernel messages there.
    echo 1 >/proc/sys/kernel/printk
    setsid -c chroot /host /bin/sh "$work/command.sh" </dev/ttyS0 >/dev/ttyS0 2>&1
else
    chroot /host /bin/sh "$work/command.sh" </dev/null >"/host$work/stdout" 2>"/host$work/stderr"
fi
status=$?
echo "$status" >"/host$work/status.part"
mv "/host$work/status.part" "/host$work/status"
stop "exit $status"
