#!/bin/sh
# Runs once the system is up: tells what it sees and does what the kernel command line asks, with the same words as the initramfs:
#   vmm.run=BASE64, or a disk that begins with the line #!VMMRUN: a shell script
#   vmm.action=poweroff|reboot|reboot-once    (reboot-once reboots, and powers off when it is up again)
#   vmm.report=no     without the report
# Without a script or an action it leaves the console to people.
action= script= report=yes
for word in $(cat /proc/cmdline); do
    case $word in
        vmm.run=*) script=${word#*=} ;;
        vmm.action=*) action=${word#*=} ;;
        vmm.report=*) report=${word#*=} ;;
    esac
done
script_disks=
for disk in /sys/block/*; do
    disk=/dev/${disk##*/}
    if [ -b "$disk" ] && [ "$(head -c 8 "$disk" 2>/dev/null | tr -d '\0')" = '#!VMMRUN' ]; then
        script_disks="$script_disks $disk"
    fi
done
[ -n "$action$script$script_disks" ] || exit 0

exec </dev/null >/dev/console 2>&1
echo 1 >/proc/sys/kernel/printk
if [ "$report" = yes ]; then
    . /usr/local/lib/vmm-report.sh
    report
    systemctl --failed --plain --no-legend | while read -r unit rest; do
        echo "VMM-TEST: failed-unit=$unit"
    done
    echo "VMM-TEST: multi-user=$(systemctl is-active multi-user.target)"
fi
again=/var/lib/vmm-rebooted
if [ "$action" = reboot-once ]; then
    if [ -e $again ]; then action=poweroff; else action=reboot; fi
    [ $action = reboot ] && : >$again
fi
if [ -n "$script" ]; then
    echo "$script" | base64 -d >/run/vmm-script
    sh /run/vmm-script
    echo "VMM-TEST: run-status=$?"
fi
for disk in $script_disks; do
    tr -d '\0' <"$disk" >/run/vmm-disk-script
    sh /run/vmm-disk-script
    echo "VMM-TEST: run-status=$?"
done
echo "VMM-TEST: action=${action:-none}"
case $action in
    # Without a D-Bus daemon systemctl says so and goes on.
    poweroff | reboot) systemctl --no-block "$action" 2>/dev/null ;;
esac
