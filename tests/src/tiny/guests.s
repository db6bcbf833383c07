# The tiny guests: one blob, loaded at BASE and entered at one of the places that its table lists, by the PVH ABI: 32-bit protected
# mode, flat segments, no paging, interrupts off, ebx = start info. Plain integer instructions only, as some KVMs emulate this code.
# In the order of `Guest` in mod.rs.

.pushsection .rodata.tiny_guests, "a", @progbits
.code32

.set BASE, 0x100000
.set STACK, BASE + 0x8000           # end of the loaded segment
.set SERIAL, 0x3f8
.set SERIAL_STATUS, 0x3fd
.set DEBUG_CONSOLE, 0xe9
.set ACPI_CONTROL, 0x3c0
.set LAPIC, 0xfee00000
.set CONFIG_ADDRESS, 0xcf8
.set CONFIG_DATA, 0xcfc
.set CONSOLE_BAR, 0xd0000000        # in the window for 32-bit BARs
.set CONSOLE_CONFIG, 0x4000         # of virtio-console's own configuration in its BAR
.set TRAMPOLINE, 0x40000            # of application processors; nothing of the boot data is there
.set STARTED, 0x800                 # in the trampoline's page: how many came up
.set GED_EVENTS, 0xf9000000         # where the ACPI tables say
.set GED_POWER_BUTTON, 8
.set GED_GENERATION, 16
.set GENERATION_ID, 0xfe000         # where the ACPI tables say
.set PVPANIC, 0x00111b36            # device and vendor
.set PVPANIC_PANICKED, 1
.set KVM_CLOCK, 0x4b564d01          # MSR_KVM_SYSTEM_TIME_NEW
.set PM_TIMER, 0xb008               # where the ACPI tables say
.set START_INFO_CMDLINE, 0x18       # in the PVH start info
.set START_INFO_RSDP, 0x20
.set WINDOW, 0xc0000000             # BARs are moved to here, where 32-bit code reaches them; 1 MiB each
.set RINGS, 0x200000                # 64 KiB for each device, 1 KiB of it for each queue, from DATA on its buffers
.set AVAILABLE, 0x100               # in a queue's rings
.set USED, 0x200
.set DATA, 0x1000
.set STATUS, 0x1080                 # a disk's answer
.set NOTIFY, 0x6000                 # in the BAR
.set PAGES, 0x400000                # behind the rings of all devices
.set SECTOR, DATA + 8               # of a disk's request
.set BUFFER, DATA + 0x100           # a disk's data

.globl tiny_guests_start
.globl tiny_guests_end
tiny_guests_start:
blob:
    .long hello - blob, reset - blob, i8042_reset - blob, triple_fault - blob, spin - blob, halt - blob
    .long echo - blob, smp - blob, ticker - blob, post - blob, pci_scan - blob, debug_console - blob
    .long crash - blob, bios_reset - blob, panic - blob, nmi - blob, power_button - blob, flood - blob, console_size - blob
    .long drivers - blob, pages - blob, generation - blob, clocks - blob
    .long disk - blob
    .long 0

# Prints the text, then the command line, and powers off.
hello:
    mov $STACK, %esp
    mov $(BASE + hello_text - blob), %esi
    call print
    mov START_INFO_CMDLINE(%ebx), %esi
    test %esi, %esi
    jz 1f
    call print
1:  call print_newline
    jmp power_off
hello_text:
    .asciz "hello "

# Says so and resets by ACPI's register.
reset:
    mov $STACK, %esp
    mov $(BASE + boot_text - blob), %esi
    call print
    mov $1, %al
    mov $ACPI_CONTROL, %dx
    out %al, (%dx)
    jmp stop

# Says so and resets by the keyboard controller.
i8042_reset:
    mov $STACK, %esp
    mov $(BASE + boot_text - blob), %esi
    call print
    mov $0xfe, %al
    out %al, $0x64
    jmp stop
boot_text:
    .asciz "boot\n"

# Says so and takes an exception with no interrupt table.
triple_fault:
    mov $STACK, %esp
    mov $(BASE + fault_text - blob), %esi
    call print
    lidt (BASE + no_table - blob)
    ud2
    jmp stop
no_table:
    .word 0
    .long 0
fault_text:
    .asciz "fault\n"

# Runs and never waits: a dot now and then.
spin:
    mov $STACK, %esp
1:  mov $0x8000, %ecx
2:  dec %ecx
    jnz 2b
    mov $'.', %al
    call print_char
    jmp 1b

# Says so and does nothing ever after.
halt:
    mov $STACK, %esp
    mov $(BASE + halt_text - blob), %esi
    call print
    jmp stop
halt_text:
    .asciz "halted\n"

# Prints what it is sent; 'q' powers off.
echo:
    mov $STACK, %esp
    mov $(BASE + ready_text - blob), %esi
    call print
1:  mov $SERIAL_STATUS, %dx
    in (%dx), %al
    test $1, %al
    jz 1b
    mov $SERIAL, %dx
    in (%dx), %al
    out %al, (%dx)
    cmp $'q', %al
    jne 1b
    call print_newline
    jmp power_off
ready_text:
    .asciz "ready\n"

# Starts as many processors as the command line's digit says, one after the other; each says its APIC id.
smp:
    mov $STACK, %esp
    mov START_INFO_CMDLINE(%ebx), %eax
    movzbl (%eax), %ebp
    sub $'0', %ebp
    mov $(BASE + ap_start - blob), %esi
    mov $TRAMPOLINE, %edi
    mov $(ap_end - ap_start), %ecx
    rep movsb
    movl $0, TRAMPOLINE + STARTED
    movl $0x1ff, LAPIC + 0xf0       # spurious vector; software enable
    mov $(BASE + bsp_text - blob), %esi
    call print
    mov $1, %edi
1:  cmp %ebp, %edi
    jae 3f
    mov %edi, %eax
    shl $24, %eax
    mov %eax, LAPIC + 0x310         # destination
    movl $0x4500, LAPIC + 0x300     # INIT
    mov %eax, LAPIC + 0x310
    movl $(0x4600 | TRAMPOLINE >> 12), LAPIC + 0x300
2:  cmp %edi, TRAMPOLINE + STARTED
    jne 2b
    inc %edi
    jmp 1b
3:  mov $(BASE + up_text - blob), %esi
    call print
    jmp power_off
bsp_text:
    .asciz "cpu 0\n"
up_text:
    .asciz "all up\n"

# What started processors run, in real mode at the start of a segment.
.code16
ap_start:
    mov %cs, %ax
    mov %ax, %ds
    mov $1, %eax
    cpuid
    shr $24, %ebx
    mov $SERIAL, %dx
    xor %si, %si
1:  mov (ap_text - ap_start)(%si), %al
    test %al, %al
    jz 2f
    out %al, (%dx)
    inc %si
    jmp 1b
2:  mov %bl, %al
    add $'0', %al
    out %al, (%dx)
    mov $'\n', %al
    out %al, (%dx)
    lock incl STARTED
3:  cli
    hlt
    jmp 3b
ap_text:
    .asciz "cpu "
ap_end:
.code32

# Counts for ever, eight digits a line.
ticker:
    mov $STACK, %esp
    xor %edi, %edi
1:  mov %edi, %eax
    mov $8, %ecx
    call print_hex
    call print_newline
    inc %edi
    mov $2000, %ecx
2:  dec %ecx
    jnz 2b
    jmp 1b

# A POST code is the first thing it does: the end of the VMM's own work at boot.
post:
    mov $1, %al
    out %al, $0x80
    jmp stop

# Prints the functions of bus 0 as the ports show them, then as the ECAM does that the ACPI tables name.
pci_scan:
    mov $STACK, %esp
    xor %edi, %edi
1:  xor %eax, %eax
    call select_config
    in (%dx), %eax
    mov $(BASE + ports_text - blob), %esi
    call print_function
    inc %edi
    cmp $32, %edi
    jb 1b

    mov START_INFO_RSDP(%ebx), %eax
    mov 24(%eax), %esi              # XSDT
    mov %esi, %ebp
    add 4(%esi), %ebp               # its end
    add $36, %esi
2:  cmp %ebp, %esi
    jae 4f
    mov (%esi), %eax
    add $8, %esi
    cmpl $0x4746434d, (%eax)        # "MCFG"
    jne 2b
    mov 44(%eax), %ebp              # base of the first segment
    xor %edi, %edi
3:  mov %edi, %eax
    shl $15, %eax
    mov (%ebp, %eax), %eax
    mov $(BASE + ecam_text - blob), %esi
    call print_function
    inc %edi
    cmp $32, %edi
    jb 3b
    jmp power_off
4:  mov $(BASE + no_mcfg_text - blob), %esi
    call print
    jmp power_off
ports_text:
    .asciz "ports "
ecam_text:
    .asciz "ecam "
no_mcfg_text:
    .asciz "no MCFG\n"

# Prints on the debug console and powers off.
debug_console:
    mov $STACK, %esp
    mov $(BASE + debug_text - blob), %esi
1:  lodsb
    test %al, %al
    jz power_off
    mov $DEBUG_CONSOLE, %dx
    out %al, (%dx)
    jmp 1b
debug_text:
    .asciz "debug console\n"

# Says so and goes where nothing is: no KVM can go on from there.
crash:
    mov $STACK, %esp
    mov $(BASE + crash_text - blob), %esi
    call print
    mov $0xd0000000, %eax
    jmp *%eax
crash_text:
    .asciz "crash\n"

# Says so and goes to real mode and the reset vector, as Linux does where the firmware is to reset.
bios_reset:
    mov $STACK, %esp
    mov $(BASE + boot_text - blob), %esi
    call print
    mov $(BASE + real_mode - blob), %esi
    mov $TRAMPOLINE, %edi
    mov $(real_mode_end - real_mode), %ecx
    rep movsb
    lgdt (BASE + real_mode_table - blob)
    ljmp $8, $0
.code16
real_mode:
    mov %cr0, %eax
    and $~1, %eax
    mov %eax, %cr0
    ljmp $0xf000, $0xfff0
real_mode_end:
.code32
real_mode_table:
    .word 15
    .long BASE + real_mode_segments - blob
real_mode_segments:
    .quad 0
    .quad 0x00009b000000ffff | TRAMPOLINE << 16     # 16-bit code

# Finds the panic device on PCI bus 0, says through it that it panicked, then says so, and halts.
panic:
    mov $STACK, %esp
    xor %edi, %edi
1:  xor %eax, %eax
    call select_config
    in (%dx), %eax
    cmp $PVPANIC, %eax
    je 2f
    inc %edi
    cmp $32, %edi
    jb 1b
    mov $(BASE + no_pvpanic_text - blob), %esi
    call print
    jmp power_off
2:  mov $4, %eax                    # command: memory space on
    call select_config
    mov $2, %ax
    out %ax, (%dx)
    mov $0x10, %eax                 # BAR 0
    call select_config
    in (%dx), %eax
    and $0xfffffff0, %eax
    movb $PVPANIC_PANICKED, (%eax)
    mov $(BASE + panic_text - blob), %esi
    call print
    jmp stop
no_pvpanic_text:
    .asciz "no pvpanic\n"
panic_text:
    .asciz "panicked\n"

# Says that it is ready, halts with interrupts off, says so at a non-maskable interrupt, and halts for good: KVMs that emulate this code
# do not know iret.
nmi:
    mov $STACK, %esp
    lgdt (BASE + flat_table - blob)
    ljmp $8, $(BASE + 1f - blob)
1:  mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $(BASE + nmi_handler - blob), %edx
    movzwl %dx, %eax
    or $0x80000, %eax               # selector 8
    mov %eax, TRAMPOLINE + 16       # vector 2
    mov $0x8e00, %dx                # present, 32-bit interrupt gate
    mov %edx, TRAMPOLINE + 20
    lidt (BASE + nmi_table - blob)
    mov $(BASE + ready_text - blob), %esi
    call print
    jmp stop
nmi_handler:
    mov $(BASE + nmi_text - blob), %esi
    call print
    jmp stop
flat_table:
    .word 23
    .long BASE + flat_segments - blob
flat_segments:
    .quad 0
    .quad 0x00cf9b000000ffff        # 32-bit code
    .quad 0x00cf93000000ffff        # data
nmi_table:
    .word 23
    .long TRAMPOLINE
nmi_text:
    .asciz "nmi\n"

# Says that it is ready, waits until the power button is pressed, says so and powers off.
power_button:
    mov $STACK, %esp
    mov $(BASE + ready_text - blob), %esi
    call print
1:  mov GED_EVENTS, %al             # reading clears it
    test $GED_POWER_BUTTON, %al
    jz 1b
    mov $(BASE + button_text - blob), %esi
    call print
    jmp power_off
button_text:
    .asciz "button\n"

# Selects the configuration register eax of device edi on bus 0; dx is the data port then. Clobbers eax.
select_config:
    mov %edi, %edx
    shl $11, %edx
    or %edx, %eax
    or $0x80000000, %eax
    mov $CONFIG_ADDRESS, %dx
    out %eax, (%dx)
    mov $CONFIG_DATA, %dx
    ret

# Counts for ever as fast as it can, eight digits a line; a dot on the debug console for every 16 lines.
flood:
    mov $STACK, %esp
    xor %edi, %edi
1:  mov %edi, %eax
    mov $8, %ecx
    call print_hex
    call print_newline
    inc %edi
    test $15, %edi
    jnz 1b
    mov $'.', %al
    mov $DEBUG_CONSOLE, %dx
    out %al, (%dx)
    jmp 1b

# Puts virtio-console's registers where 32 bits reach them, and prints the size of its window, rows and columns as four hexadecimal
# digits each, at first and whenever it is another one.
console_size:
    mov $STACK, %esp
    mov $0x80000000, %edi           # configuration address of the function
1:  add $0x800, %edi
    cmp $0x80010000, %edi
    jae power_off
    xor %ecx, %ecx
    call config_read
    cmp $0x10431af4, %eax
    jne 1b
    mov $4, %ecx                    # command: decode nothing
    xor %eax, %eax
    call config_write
    mov $0x10, %ecx
    mov $CONSOLE_BAR, %eax
    call config_write
    mov $0x14, %ecx
    xor %eax, %eax
    call config_write
    mov $4, %ecx
    mov $2, %eax                    # command: decode memory
    call config_write
    xor %edi, %edi
2:  mov CONSOLE_BAR + CONSOLE_CONFIG, %eax
    cmp %edi, %eax
    je 2b
    mov %eax, %edi
    mov $8, %ecx
    call print_hex
    call print_newline
    jmp 2b

# Reads register ecx of the function edi into eax. Clobbers edx.
config_read:
    lea (%edi, %ecx), %eax
    mov $CONFIG_ADDRESS, %dx
    out %eax, (%dx)
    mov $CONFIG_DATA, %dx
    in (%dx), %eax
    ret

# Writes eax to register ecx of the function edi. Clobbers eax, edx, esi.
config_write:
    mov %eax, %esi
    lea (%edi, %ecx), %eax
    mov $CONFIG_ADDRESS, %dx
    out %eax, (%dx)
    mov %esi, %eax
    mov $CONFIG_DATA, %dx
    out %eax, (%dx)
    ret

# Drives the virtio devices of bus 0 one after the other: a few requests each. Says which, with the answers of a disk, and halts.
drivers:
    mov $STACK, %esp
    xor %edi, %edi
1:  inc %edi
    cmp $32, %edi
    je 7f
    xor %ecx, %ecx
    call config_select
    in (%dx), %eax
    cmp $0x1af4, %ax
    jne 1b
    shr $16, %eax
    push %eax
    call move_bar
    call set_up_device
    pop %eax
    cmp $0x1042, %ax
    je 2f
    cmp $0x1043, %ax
    je 5f
    cmp $0x1044, %ax
    je 6f
    jmp 1b

2:  mov $(BASE + disk_text - blob), %esi
    call print
    call rings
    mov $(BASE + disk_requests - blob), %ebx
3:  mov (%ebx), %eax
    cmp $-1, %eax
    je 4f
    movl $0, SECTOR(%esi)
    call disk_request
    add $'0', %al
    call print_char
    add $12, %ebx
    jmp 3b
4:  call print_newline
    jmp 1b

5:  call rings
    movl $(BASE + console_text - blob), 0x400(%esi)
    movl $8, 0x408(%esi)
    mov $1, %ecx                    # the driver's output
    call offer
    mov $(BASE + console_text - blob), %esi
    call print
    jmp 1b

6:  call rings
    lea DATA(%esi), %eax
    mov %eax, (%esi)
    movl $64, 8(%esi)
    movl $2, 12(%esi)               # for the device to write
    xor %ecx, %ecx
    call offer
    mov $(BASE + rng_text - blob), %esi
    call print
    jmp 1b

7:  mov $(BASE + driven_text - blob), %esi
    call print
    jmp stop
disk_requests:                      # type, bytes of data, flags and next of their descriptor
    .long 0, 512, 3 | 2 << 16       # read
disk_write:
    .long 1, 512, 1 | 2 << 16       # write
    .long 4, 0, 0                   # flush
    .long 11, 16, 1 | 2 << 16       # discard
    .long 13, 16, 1 | 2 << 16       # write zeroes
    .long -1
disk_text:
    .asciz "disk "
console_text:
    .asciz "console\n"
rng_text:
    .asciz "rng\n"
driven_text:
    .asciz "driven\n"

# Makes device edi's BAR 0 start at ebp, which is set. Clobbers eax, ecx, edx.
move_bar:
    mov %edi, %ebp
    shl $20, %ebp
    add $WINDOW, %ebp
    mov $4, %ecx                    # command register: no decoding meanwhile
    call config_select
    xor %eax, %eax
    out %eax, (%dx)
    mov $0x10, %ecx
    call config_select
    mov %ebp, %eax
    out %eax, (%dx)
    mov $0x14, %ecx
    call config_select
    xor %eax, %eax
    out %eax, (%dx)
    mov $4, %ecx
    call config_select
    mov $6, %eax                    # memory and bus master
    out %eax, (%dx)
    ret

# Selects register ecx of device edi's configuration space: it is at port dx then. Keeps all but edx.
config_select:
    push %eax
    mov %edi, %eax
    shl $11, %eax
    lea 0x80000000(%eax, %ecx), %eax
    mov $CONFIG_ADDRESS, %dx
    out %eax, (%dx)
    mov $CONFIG_DATA, %dx
    pop %eax
    ret

# Sets the device at ebp up, with queues of 4 descriptors. Clobbers eax, ecx, edx, esi.
set_up_device:
    movb $0, 20(%ebp)               # status: reset
    movb $3, 20(%ebp)               # a driver is there
    movl $0, (%ebp)
    mov 4(%ebp), %eax
    and $(1 << 9 | 1 << 13 | 1 << 14), %eax # a disk's flush, discard, write zeroes
    movl $0, 8(%ebp)
    mov %eax, 12(%ebp)
    movl $1, 8(%ebp)
    movl $1, 12(%ebp)               # VIRTIO_F_VERSION_1
    movb $11, 20(%ebp)              # features are agreed on
    call rings
    movzwl 18(%ebp), %edx
    xor %ecx, %ecx
1:  mov %cx, 22(%ebp)
    movw $4, 24(%ebp)
    mov %esi, 32(%ebp)
    movl $0, 36(%ebp)
    lea AVAILABLE(%esi), %eax
    mov %eax, 40(%ebp)
    movl $0, 44(%ebp)
    lea USED(%esi), %eax
    mov %eax, 48(%ebp)
    movl $0, 52(%ebp)
    movw $1, 28(%ebp)
    add $0x400, %esi
    inc %ecx
    cmp %edx, %ecx
    jb 1b
    movb $15, 20(%ebp)              # the driver is ready
    ret

# Sets esi to the rings of device edi.
rings:
    mov %edi, %esi
    shl $16, %esi
    add $RINGS, %esi
    ret

# Has the disk at ebp do the request at ebx, of type eax, and gives its answer in al. Clobbers eax, ecx, edx.
disk_request:
    mov %eax, DATA(%esi)
    movl $1, BUFFER + 8(%esi)       # one sector, if the data are a range
    lea DATA(%esi), %eax
    mov %eax, (%esi)
    movl $16, 8(%esi)
    movl $(1 | 1 << 16), 12(%esi)
    lea BUFFER(%esi), %eax
    mov %eax, 16(%esi)
    mov 8(%ebx), %eax
    mov %eax, 28(%esi)
    mov 4(%ebx), %eax
    mov %eax, 24(%esi)
    test %eax, %eax
    jnz 1f
    movl $(1 | 2 << 16), 12(%esi)   # no data
1:  lea STATUS(%esi), %eax
    mov %eax, 32(%esi)
    movl $1, 40(%esi)
    movl $2, 44(%esi)
    xor %ecx, %ecx
    call offer
    mov STATUS(%esi), %al
    ret

# Offers what begins at descriptor 0 of queue ecx to the device at ebp, and waits until it was used. Clobbers eax, edx.
offer:
    mov %ecx, %eax
    shl $10, %eax
    add %esi, %eax
    incw AVAILABLE + 2(%eax)
    mov %cx, NOTIFY(%ebp, %ecx, 4)
1:  mov USED + 2(%eax), %dx
    cmp AVAILABLE + 2(%eax), %dx
    jne 1b
    ret

# Counts for ever, eight digits a line, in 256 pages of memory at once. Halts when one of them is not what it was and, if the command
# line begins with 'h', when something comes on the serial port.
pages:
    mov $STACK, %esp
    xor %ebp, %ebp
    mov START_INFO_CMDLINE(%ebx), %esi
    test %esi, %esi
    jz 1f
    cmpb $'h', (%esi)
    sete %al
    movzbl %al, %esi
1:  mov $RINGS, %edi
    mov %ebp, %eax
    call count_on
    mov %ebp, %eax
    mov $8, %ecx
    call print_hex
    call print_newline
    inc %ebp
    test %esi, %esi
    jz 1b
    mov $SERIAL_STATUS, %dx
    in (%dx), %al
    test $1, %al
    jz 1b
    mov $(BASE + halt_text - blob), %esi
    call print
    jmp stop

# Adds 1 to what the 256 pages from edi on begin with, which is eax. Says so and halts where it is not. Clobbers ecx, edx, edi.
count_on:
    mov $256, %ecx
1:  cmp %eax, (%edi)
    jne 2f
    incl (%edi)
    add $4096, %edi
    dec %ecx
    jnz 1b
    ret
2:  mov $(BASE + pages_text - blob), %esi
    call print
    jmp stop
pages_text:
    .asciz "memory is not what it was\n"

# Prints half of its generation ID now and then, 16 digits a line, and says so when it is told of another.
generation:
    mov $STACK, %esp
1:  mov GENERATION_ID, %eax
    mov $8, %ecx
    call print_hex
    mov GENERATION_ID + 4, %eax
    mov $8, %ecx
    call print_hex
    call print_newline
    mov $2000, %ecx
2:  dec %ecx
    jnz 2b
    mov GED_EVENTS, %al             # reading clears it
    test $GED_GENERATION, %al
    jz 1b
    mov $(BASE + another_text - blob), %esi
    call print
    jmp 1b
another_text:
    .asciz "another\n"

# Prints its clocks for ever, 72 digits a line: the TSC, then of kvm-clock system_time, tsc_timestamp, tsc_to_system_mul and the double
# word that begins with tsc_shift, at last the PM timer.
clocks:
    mov $STACK, %esp
    mov $KVM_CLOCK, %ecx
    mov $(RINGS | 1), %eax
    xor %edx, %edx
    wrmsr
1:  mov $STACK, %esp
    mov RINGS, %ebp                 # version, odd while it is being written
    mov $PM_TIMER, %dx
    in (%dx), %eax
    push %eax
    pushl RINGS + 28
    pushl RINGS + 24
    pushl RINGS + 8
    pushl RINGS + 12
    pushl RINGS + 16
    pushl RINGS + 20
    rdtsc
    push %eax
    push %edx
    test %ebp, %ebp
    jz 1b
    test $1, %ebp
    jnz 1b
    cmp RINGS, %ebp
    jne 1b
    mov $9, %edi
2:  pop %eax
    mov $8, %ecx
    call print_hex
    dec %edi
    jnz 2b
    call print_newline
    jmp 1b

# Counts for ever as `pages`, each number by way of the first disk: from one of its first 256 sectors it is read back. Halts where the
# answer is another one, or without a disk.
disk:
    mov $STACK, %esp
    xor %edi, %edi
    xor %ecx, %ecx
1:  inc %edi
    cmp $32, %edi
    je 3f
    call config_select
    in (%dx), %eax
    cmp $0x10421af4, %eax
    jne 1b
    call move_bar
    call set_up_device
    call rings
    push $0
2:  movzbl (%esp), %eax
    mov %eax, SECTOR(%esi)
    mov (%esp), %eax
    mov %eax, BUFFER(%esi)
    mov $(BASE + disk_write - blob), %ebx
    mov (%ebx), %eax
    call disk_request
    test %al, %al
    jnz 3f
    movl $-1, BUFFER(%esi)
    mov $(BASE + disk_requests - blob), %ebx
    mov (%ebx), %eax
    call disk_request
    test %al, %al
    jnz 3f
    mov BUFFER(%esi), %eax
    cmp (%esp), %eax
    jne 3f
    mov $PAGES, %edi
    call count_on
    mov (%esp), %eax
    mov $8, %ecx
    call print_hex
    call print_newline
    incl (%esp)
    jmp 2b
3:  mov $(BASE + wrong_disk_text - blob), %esi
    call print
    jmp stop
wrong_disk_text:
    .asciz "the disk's memory is not what it was\n"

power_off:
    mov $0x34, %al                  # sleep type 5, sleep enable
    mov $ACPI_CONTROL, %dx
    out %al, (%dx)
stop:
    cli
    hlt
    jmp stop

# Prints esi's text, the number edi and the identity eax, unless that says that nobody is there. Keeps ebx, edi, ebp.
print_function:
    cmp $0xffffffff, %eax
    je 1f
    push %ebx
    push %eax
    call print
    mov %edi, %eax
    mov $2, %ecx
    call print_hex
    mov $' ', %al
    call print_char
    mov (%esp), %eax
    mov $4, %ecx
    call print_hex                  # vendor
    mov $':', %al
    call print_char
    pop %eax
    shr $16, %eax
    mov $4, %ecx
    call print_hex                  # device
    call print_newline
    pop %ebx
1:  ret

# Prints the text at esi, which ends with a zero. Clobbers eax, edx, esi.
print:
    lodsb
    test %al, %al
    jz 1f
    call print_char
    jmp print
1:  ret

# Prints the lowest ecx hexadecimal digits of eax. Clobbers eax, ebx, ecx, edx.
print_hex:
    mov %eax, %ebx
1:  dec %ecx
    js 3f
    mov %ebx, %eax
    push %ecx
    shl $2, %ecx
    shr %cl, %eax
    pop %ecx
    and $15, %eax
    cmp $10, %al
    jb 2f
    add $('a' - '0' - 10), %al
2:  add $'0', %al
    call print_char
    jmp 1b
3:  ret

print_newline:
    mov $'\n', %al
# Prints al. Clobbers edx.
print_char:
    mov $SERIAL, %dx
    out %al, (%dx)
    ret

tiny_guests_end:

# A guest of its own, for a bzImage: entered in 64-bit mode, rsi = zero page. Says so, prints the command line, powers off.
.code64
.globl tiny_linux_start
.globl tiny_linux_end
.set ZERO_PAGE_CMDLINE, 0x228       # in the zero page: cmd_line_ptr

tiny_linux_start:
    mov ZERO_PAGE_CMDLINE(%rsi), %ebx
    lea linux_text(%rip), %rsi
    mov $SERIAL, %edx
1:  mov (%rsi), %al
    inc %rsi
    test %al, %al
    jz 2f
    out %al, (%dx)
    jmp 1b
2:  mov %rbx, %rsi                  # after the text the command line; after that the end
    lea linux_end_of_text(%rip), %rbx
    cmp %rsi, %rbx
    jne 1b
    mov $'\n', %al
    out %al, (%dx)
    mov $0x34, %al
    mov $ACPI_CONTROL, %edx
    out %al, (%dx)
3:  cli
    hlt
    jmp 3b
linux_text:
    .ascii "linux "
linux_end_of_text:
    .byte 0
tiny_linux_end:

.popsection
