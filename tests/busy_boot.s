# A guest without an operating system, for tests/qemu_cut.rs: 16-bit real mode.
# It counts at 0x600, writes each count into one of 128 pages, and every 64
# counts writes 4 KiB beginning with the count to one of two disks by BIOS call.
# 0x604 holds the last count whose write the BIOS has confirmed, 0x608 errors.
# To assemble: as --32 -o b.o tests/busy_boot.s; ld -m elf_i386 -Ttext 0x7c00
#   --oformat binary -o tests/busy_boot.bin b.o
.code16
.globl _start
_start:
    ljmp $0, $begin
begin:
    cli
    xorl %eax, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7000, %sp
    movl %eax, 0x600
    movl %eax, 0x604
    movl %eax, 0x608
    sti
loop:
    incl 0x600
    movl 0x600, %eax
    movw %ax, %bx
    andw $0x7f, %bx
    shlw $8, %bx
    addw $0x1000, %bx
    movw %bx, %es
    movl %eax, %es:0
    movl %eax, %es:0xff8
    testb $0x3f, %al
    jnz loop
    # which = count >> 6; disk = which & 1; slot = (which >> 1) & 511; lba = 64 + 8 * slot
    movl %eax, 0x8000
    movl %eax, 0x8ffc
    shrl $6, %eax
    movb %al, %dl
    andb $1, %dl
    addb $0x80, %dl
    shrl $1, %eax
    andl $511, %eax
    shll $3, %eax
    addl $64, %eax
    movl $0x00080010, 0x620
    movl $0x00008000, 0x624
    movl %eax, 0x628
    movl $0, 0x62c
    movw $0x620, %si
    movb $0x43, %ah
    movb $0, %al
    int $0x13
    jc failed
    movl 0x600, %eax
    movl %eax, 0x604
    jmp loop
failed:
    incl 0x608
    jmp loop
    .org 510
    .word 0xaa55
