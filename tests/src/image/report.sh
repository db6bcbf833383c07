# Tells on standard output what the guest sees, one fact a line, each line with the same prefix.
report() {
    echo "VMM-TEST: begin"
    echo "VMM-TEST: kernel=$(uname -r)"
    echo "VMM-TEST: cpus=$(grep -c ^processor /proc/cpuinfo)"
    echo "VMM-TEST: mem-kib=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
    echo "VMM-TEST: uptime=$(cut -d ' ' -f 1 /proc/uptime)"
    echo "VMM-TEST: date=$(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "VMM-TEST: epoch=$(date +%s)"
    echo "VMM-TEST: clocksource=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
    for disk in /sys/block/*; do
        [ -e "$disk/device" ] || continue
        echo "VMM-TEST: disk=${disk##*/} sectors=$(cat "$disk/size") ro=$(cat "$disk/ro") serial=$(cat "$disk/serial" 2>/dev/null)"
    done
    for device in /sys/bus/pci/devices/*; do
        [ -e "$device/vendor" ] || continue
        driver=$(readlink "$device/driver")
        echo "VMM-TEST: pci=${device##*/} id=$(cat "$device/vendor"):$(cat "$device/device") driver=${driver##*/}"
    done
    dmesg | grep -E 'ACPI.*([Ee]rror|[Ww]arning|Exception|BIOS|[Ff]ailed)|Firmware Bug|FW bug|Call Trace|WARNING: CPU|BUG:|Oops|soft lockup|rcu.*stall' |
        sed 's/^/VMM-TEST: dmesg=/'
    echo "VMM-TEST: end"
}
