# The guest that proves itself; mod.rs has the argument, layout.rs the same
# numbers for the model. Flat, position-independent, 64-bit, no interrupts.
#
# Registers that last: rbp this vCPU's control page, r12 its sequence N, r13
# the digest D of its ledger. A call keeps rbx, r14, r15 beside them.

.set PROOF_GLOBALS, 0x1f0000
.set G_READY, 0x00
.set G_VCPUS, 0x08
.set G_PAGES, 0x10
.set G_BLOCKS, 0x18
.set G_LEDGER, 0x20
.set G_STRIDE, 0x28
.set G_PAGE_BASE, 0x30
.set G_FILL_BASE, 0x38
.set G_FILL, 0x40
.set G_REQUEST, 0x48
.set G_BEAT, 0x50
.set G_DUE, 0x58
.set G_CODE, 0x60
.set G_CACHE_BASE, 0x68
.set G_LOCK, 0x100

.set PROOF_CONTROL, 0x200000
.set C_MAGIC, 0x00
.set C_N, 0x08
.set C_D, 0x10
.set C_INTENT, 0x18
.set C_INTENT_VALUE, 0x20
.set C_PAGE_WRITES, 0x28
.set C_BLOCK_WRITES, 0x30
.set C_FIRST_PAGE, 0x38
.set C_PAGES, 0x40
.set C_FIRST_BLOCK, 0x48
.set C_BLOCKS, 0x50
.set C_PAGE_CURSOR, 0x58
.set C_BLOCK_CURSOR, 0x60
.set C_MEM_FAULT, 0x68
.set C_DISK_FAULT, 0x70
.set C_ANSWERED, 0x78
.set C_PAGES_SEEN, 0x80
.set C_BLOCKS_SEEN, 0x88
.set C_CHANGES, 0x90
.set C_EPOCH, 0x98
.set C_VCPU, 0xa0
.set C_CACHE_CURSOR, 0xa8
.set C_CLOCK, 0xb0
.set C_SWEEP_PAGE, 0xb8
.set C_SWEEP_BLOCK, 0xc0
.set C_SWEEP_DUE, 0xc8
.set C_SHARE, 0xd0
.set C_SSE, 0xe0

.set PROOF_BUFFERS, 0x240000
.set PROOF_NOISE, 0x2d0000
.set NOISE_WORDS, 2048
.set PROOF_LEDGER, 0x300000
.set MOST_VCPUS, 64
.set CACHE_SLOTS, 16
.set FILL_PAGES, 256

# Faults: subject << 56 | reason << 48 | index.
.set LOST, 1
.set SWAPPED, 2
.set OLDER, 3
.set NEWER, 4
.set TORN, 5
.set FAILED, 6
.set DIFFERS, 7
.set SILENT, 8
.set S_PAGE, 1
.set S_BLOCK, 2
.set S_CACHE, 3
.set S_FILL, 4
.set S_LEDGER, 5
.set S_REGISTER, 6
.set S_MSR, 7
.set S_DEBUG, 8
.set S_SSE, 9
.set S_CLOCK, 10
.set S_CODE, 11
.set S_VCPU, 12
.set S_READ, 13
.set S_WRITE, 14
.set S_CONTROL, 15
.set S_FLUSH, 16

# Next of the sequence in rax; uses rdx. In place: calls are dear under an
# emulated KVM.
.macro proof_xorshift
    mov rdx, rax
    shl rdx, 13
    xor rax, rdx
    mov rdx, rax
    shr rdx, 7
    xor rax, rdx
    mov rdx, rax
    shl rdx, 17
    xor rax, rdx
.endm

.globl farhaven_proof_start
.globl farhaven_proof_end
.balign 8
farhaven_proof_start:
    cld
    mov rax, cr4
    or eax, 0x600                   # FXSAVE and SSE may be used
    mov cr4, rax
    cmp rdi, MOST_VCPUS
    jae .Lpf_rest_for_ever
    mov rbp, rdi
    shl rbp, 12
    add rbp, PROOF_CONTROL
    mov [rbp + C_VCPU], rdi
    test rdi, rdi
    jnz 1f
    call .Lpf_lay_out
    jmp 2f
1:  pause
    cmp qword ptr [PROOF_GLOBALS + G_READY], 0
    je 1b
2:  call .Lpf_start_vcpu

.Lpf_main:
    call .Lpf_check_registers
    call .Lpf_clock
    mov r14d, eax                   # now
    cmp qword ptr [rbp + C_VCPU], 0
    jne 3f
    mov edi, r14d
    call .Lpf_beat_if_due
    test eax, eax
    jz 3f
    call .Lpf_listen
3:  mov rax, [PROOF_GLOBALS + G_REQUEST]
    cmp rax, [rbp + C_ANSWERED]
    je 4f
    call .Lpf_check_all
    jmp .Lpf_main
4:  mov eax, r14d
    sub eax, [rbp + C_SWEEP_DUE]
    js 5f
    add r14d, 100
    mov [rbp + C_SWEEP_DUE], r14
    sub r14d, 100
    call .Lpf_sweep
5:  mov edi, r14d
    call .Lpf_owed
    test rax, rax
    jz 7f
    cmp rax, 8
    jbe 6f
    mov eax, 8                      # look at the clock now and then
6:  mov r15, rax
8:  call .Lpf_change
    dec r15
    jnz 8b
    jmp .Lpf_main
7:  hlt                             # nothing owed: the machine lets us rest a millisecond
    jmp .Lpf_main

.Lpf_rest_for_ever:
    hlt
    jmp .Lpf_rest_for_ever

# vCPU 0 lays out memory: rsi vCPUs, rdx bytes of RAM.
.Lpf_lay_out:
    mov rdi, PROOF_GLOBALS
    cmp rsi, MOST_VCPUS
    jbe 1f
    mov esi, MOST_VCPUS
1:  mov [rdi + G_VCPUS], rsi
    mov r8, rdx
    mov eax, 0xc0000000             # what lies above a hole is left alone
    cmp r8, rax
    jbe 1f
    mov r8, rax
1:  mov r9, r8
    shr r9, 14                      # no working set above a quarter of memory
    mov edx, 0x618
    in eax, dx
    cmp rax, r9
    jbe 1f
    mov rax, r9
1:  mov [rdi + G_PAGES], rax
    mov r10, rax
    mov edx, 0x60c
    in eax, dx
    mov ecx, eax
    mov edx, 0x61c
    in eax, dx
    cmp rax, rcx
    jbe 1f
    mov rax, rcx
1:  cmp rax, r9
    jbe 1f
    mov rax, r9
1:  mov [rdi + G_BLOCKS], rax
    mov r11d, PROOF_LEDGER
    mov [rdi + G_LEDGER], r11
    lea rcx, [rax + r10]            # items: pages, blocks, cache slots
    mov rax, rsi
    shl rax, 4
    add rcx, rax
    lea r11, [r11 + rcx*8 + 4095]
    and r11, -4096
    mov [rdi + G_CACHE_BASE], r11
    shl rax, 12
    add r11, rax
    mov [rdi + G_FILL_BASE], r11
    mov eax, FILL_PAGES
    mov [rdi + G_FILL], rax
    add r11, FILL_PAGES * 4096
    mov [rdi + G_PAGE_BASE], r11
    sub r8, r11                     # clusters of 16 pages, spread over memory
    add r10, 15
    shr r10, 4
    jnz 1f
    inc r10
1:  mov rax, r8
    xor edx, edx
    div r10
    and rax, -4096
    mov [rdi + G_STRIDE], rax
    mov rdi, PROOF_NOISE            # the noise that pages share
    mov rax, 0x2545f4914f6cdd1d
    mov ecx, NOISE_WORDS
1:  proof_xorshift
    mov [rdi], rax
    add rdi, 8
    dec ecx
    jnz 1b
    push rbx
    xor ebx, ebx                    # the fill, never written again
1:  mov rdi, rbx
    call .Lpf_fill_seed
    mov rdi, rbx
    shl rdi, 12
    add rdi, [PROOF_GLOBALS + G_FILL_BASE]
    mov ecx, 512
    test bl, 1
    jz 2f
3:  proof_xorshift
    mov [rdi], rax
    add rdi, 8
    dec ecx
    jnz 3b
    jmp 4f
2:  test rax, rax                   # zeros stay untouched
    jz 4f
    rep stosq
4:  inc rbx
    cmp rbx, FILL_PAGES
    jb 1b
    pop rbx
    call .Lpf_code_sum
    mov [PROOF_GLOBALS + G_CODE], rax
    call .Lpf_clock
    mov [PROOF_GLOBALS + G_DUE], rax
    mov qword ptr [PROOF_GLOBALS + G_READY], 1
    ret

# The seed of fill page rdi in rax: zero for zeros, odd pages are noise, of the
# even ones every fourth is zeros and the others repeat one word, some the same.
.Lpf_fill_seed:
    mov rax, 0x9e3779b97f4a7c15
    test dil, 1
    jnz 1f
    test dil, 6
    jz 2f
    test dil, 2
    jz 1f
    shr rdi, 4                      # the same word on several pages
1:  inc rdi
    imul rax, rdi
    ret
2:  xor eax, eax
    ret

# Sum of the program's words in rax.
.Lpf_code_sum:
    lea rsi, [rip + farhaven_proof_start]
    lea rdx, [rip + farhaven_proof_end]
    xor eax, eax
1:  rol rax, 1
    add rax, [rsi]
    add rsi, 8
    cmp rsi, rdx
    jb 1b
    ret

# Each vCPU takes its slice and empties its blocks.
.Lpf_start_vcpu:
    push rbx
    mov rax, 0x4e45564148524146
    mov [rbp + C_MAGIC], rax
    mov rcx, [PROOF_GLOBALS + G_VCPUS]
    mov rdi, [PROOF_GLOBALS + G_PAGES]
    call .Lpf_slice
    mov [rbp + C_FIRST_PAGE], rsi
    mov [rbp + C_PAGES], rax
    mov rdi, [PROOF_GLOBALS + G_BLOCKS]
    call .Lpf_slice
    mov [rbp + C_FIRST_BLOCK], rsi
    mov [rbp + C_BLOCKS], rax
    xor r12d, r12d
    xor r13d, r13d
    call .Lpf_keep_copies
    xor ebx, ebx
1:  cmp rbx, [rbp + C_BLOCKS]
    jae 2f
    mov rsi, [rbp + C_FIRST_BLOCK]
    add rsi, rbx
    call .Lpf_cache_page
    mov rdx, rax
    mov edi, 1
    call .Lpf_disk
    call .Lpf_cache_page
    mov rdi, rax
    mov rcx, 512
    xor eax, eax
    repe scasq
    je 3f
    call .Lpf_cache_page
    mov rdi, rax
    mov ecx, 512
    xor eax, eax
    rep stosq
    mov rsi, [rbp + C_FIRST_BLOCK]
    add rsi, rbx
    call .Lpf_buffer
    mov rdx, rax
    mov edi, 2
    call .Lpf_disk
3:  inc rbx
    jmp 1b
2:  call .Lpf_clock
    mov [rbp + C_EPOCH], rax
    mov [rbp + C_SWEEP_DUE], rax
    call .Lpf_read_pace
    pop rbx
    ret

# Of rdi things among rcx vCPUs: this one's first in rsi, how many in rax.
.Lpf_slice:
    mov rax, [rbp + C_VCPU]
    mul rdi
    div rcx
    mov rsi, rax
    mov rax, [rbp + C_VCPU]
    inc rax
    mul rdi
    div rcx
    sub rax, rsi
    ret

.Lpf_read_pace:
    mov edx, 0x614
    in eax, dx
    mov edi, eax
    mov rcx, [PROOF_GLOBALS + G_VCPUS]
    call .Lpf_slice
    mov [rbp + C_SHARE], rax
    ret

# Milliseconds the guest ran, in eax; it never goes back.
.Lpf_clock:
    mov edx, 0x610
    in eax, dx
    mov ecx, eax
    sub ecx, [rbp + C_CLOCK]
    mov [rbp + C_CLOCK], rax
    jns 1f
    push rax
    mov rdx, [rbp + C_VCPU]
    mov esi, S_CLOCK << 8 | OLDER
    call .Lpf_note_memory
    pop rax
1:  ret

# How many changes are owed at rdi milliseconds, in rax.
.Lpf_owed:
    mov eax, edi
    sub eax, [rbp + C_EPOCH]
    mov ecx, eax
    mul qword ptr [rbp + C_SHARE]
    push rcx
    mov ecx, 1000
    xor edx, edx
    div rcx
    pop rcx
    sub rax, [rbp + C_CHANGES]
    jbe 2f
    mov rdx, [rbp + C_SHARE]        # a second behind: what is lost is not made up
    add rdx, 8
    cmp rax, rdx
    ja 1f
    ret
2:  xor eax, eax
    cmp ecx, 10000
    jb 3f
1:  mov [rbp + C_EPOCH], rdi
    mov qword ptr [rbp + C_CHANGES], 0
    push rax
    call .Lpf_read_pace
    pop rax
3:  ret

# mix(item rsi, value rdx) in rax; uses rcx.
.Lpf_mix:
    mov rcx, 0xd6e8feb86659fd93
    mov rax, rsi
    inc rax
    imul rax, rcx
    xor rax, rdx
    mov rcx, 0x9e3779b97f4a7c15
    imul rax, rcx
    mov rcx, rax
    shr rcx, 29
    xor rax, rcx
    ret

# Address of page item rdi in rax.
.Lpf_page_address:
    mov rax, rdi
    shr rax, 4
    mul qword ptr [PROOF_GLOBALS + G_STRIDE]
    and edi, 15
    shl rdi, 12
    add rax, rdi
    add rax, [PROOF_GLOBALS + G_PAGE_BASE]
    ret

# This vCPU's write buffer, and the cache page under its cursor, in rax.
.Lpf_buffer:
    mov rax, [rbp + C_VCPU]
    shl rax, 13
    add rax, PROOF_BUFFERS
    ret
.Lpf_cache_page:
    call .Lpf_cache_slot
    shl rax, 12
    add rax, [PROOF_GLOBALS + G_CACHE_BASE]
    ret
.Lpf_cache_slot:
    mov rax, [rbp + C_VCPU]
    shl rax, 4
    mov rcx, [rbp + C_CACHE_CURSOR]
    and ecx, CACHE_SLOTS - 1
    add rax, rcx
    ret
# Item of that slot, in rax.
.Lpf_cache_item:
    call .Lpf_cache_slot
    add rax, [PROOF_GLOBALS + G_PAGES]
    add rax, [PROOF_GLOBALS + G_BLOCKS]
    ret

# Writes content of item rsi at value rdx to address rdi.
.Lpf_put:
    call .Lpf_mix
    mov rcx, 0x31464f4f52504846
    mov [rdi], rcx
    mov [rdi + 8], rsi
    mov [rdi + 16], rdx
    mov [rdi + 24], rax
    add rdi, 32
    mov ecx, 508
    mov r8, rax
    shr r8, 61
    cmp r8d, 4
    jb 2f
    je 1f
    cmp r8d, 5
    je 3f
4:  proof_xorshift
    mov [rdi], rax
    add rdi, 8
    dec ecx
    jnz 4b
    ret
1:  mov ecx, 252                    # half of it, the rest zeros
    rep stosq
    mov ecx, 256
    xor eax, eax
2:  rep stosq
    ret
3:  mov esi, eax
    and esi, 1023
    lea rsi, [PROOF_NOISE + rsi*8]
    rep movsq
    ret

# Is at rdi the content of item rsi at value rdx? rax: 0 or the reason.
.Lpf_check:
    mov r9, rdi
    test rdx, rdx
    jnz 1f
    mov ecx, 512
    xor eax, eax
    repe scasq
    je 9f
    jmp .Lpf_why
1:  mov rax, 0x31464f4f52504846
    cmp rax, [rdi]
    jne .Lpf_why
    cmp rsi, [rdi + 8]
    jne .Lpf_why
    cmp rdx, [rdi + 16]
    jne .Lpf_why
    mov r10, rdx
    call .Lpf_mix
    cmp rax, [rdi + 24]
    jne 8f
    add rdi, 32
    mov ecx, 508
    mov r8, rax
    shr r8, 61
    cmp r8d, 4
    jb 2f
    je 5f
    cmp r8d, 5
    je 3f
4:  proof_xorshift
    cmp rax, [rdi]
    jne 8f
    add rdi, 8
    dec ecx
    jnz 4b
9:  xor eax, eax
    ret
5:  mov ecx, 252
    repe scasq
    jne 8f
    mov ecx, 256
    xor eax, eax
2:  repe scasq
    je 9b
8:  mov eax, TORN
    ret
3:  mov esi, eax
    and esi, 1023
    lea rsi, [PROOF_NOISE + rsi*8]
    repe cmpsq
    je 9b
    jmp 8b
.Lpf_why:                           # by the header that is there
    mov rax, 0x31464f4f52504846
    cmp rax, [r9]
    je 1f
    cmp qword ptr [r9], 0
    jne 8b
    cmp qword ptr [r9 + 8], 0
    jne 8b
    cmp qword ptr [r9 + 16], 0
    jne 8b
    test rdx, rdx
    jz 8b
    mov eax, LOST
    ret
1:  mov eax, SWAPPED
    cmp rsi, [r9 + 8]
    jne 1f
    mov eax, NEWER
    cmp rdx, [r9 + 16]
    jb 1f
    mov eax, OLDER
1:  ret

# Keeps the first fault: esi subject << 8 | reason, rdx index.
.Lpf_note_disk:
    mov ecx, C_DISK_FAULT
    jmp 1f
.Lpf_note_memory:
    mov ecx, C_MEM_FAULT
1:  cmp qword ptr [rbp + rcx], 0
    jne 2f
    shl rsi, 48
    or rsi, rdx
    mov [rbp + rcx], rsi
2:  ret

# One change: a page, and a block after every fourth.
.Lpf_change:
    inc qword ptr [rbp + C_CHANGES]
    cmp qword ptr [rbp + C_PAGES], 0
    je .Lpf_change_block
    push rbx
    push r14
    mov rdi, [rbp + C_PAGE_CURSOR]
    mov rcx, [rbp + C_PAGES]
    call .Lpf_turn
    mov rbx, rax
    add rbx, [rbp + C_FIRST_PAGE]
    mov rdi, rbx
    call .Lpf_check_page            # what is lost must not be covered up
    mov rdi, rbx
    call .Lpf_page_address
    mov r14, rax
    inc r12
    mov rsi, rbx
    mov rdx, r12
    call .Lpf_intend
    mov rdi, r14
    mov rsi, rbx
    mov rdx, r12
    call .Lpf_put
    mov rsi, rbx
    mov rdx, r12
    call .Lpf_commit
    inc qword ptr [rbp + C_PAGE_CURSOR]
    inc qword ptr [rbp + C_PAGE_WRITES]
    pop r14
    pop rbx
    test qword ptr [rbp + C_PAGE_WRITES], 3
    jz .Lpf_change_block
    ret

.Lpf_change_block:
    cmp qword ptr [rbp + C_BLOCKS], 0
    je 9f
    push rbx
    push r14
    mov rdi, [rbp + C_BLOCK_CURSOR]
    mov rcx, [rbp + C_BLOCKS]
    call .Lpf_turn
    mov rbx, rax
    add rbx, [rbp + C_FIRST_BLOCK]
    mov rdi, rbx
    call .Lpf_check_block
    mov r14, rbx
    add r14, [PROOF_GLOBALS + G_PAGES]
    inc r12
    mov rsi, r14
    mov rdx, r12
    call .Lpf_intend
    call .Lpf_buffer
    mov rdi, rax
    mov rsi, r14
    mov rdx, r12
    call .Lpf_put
    mov edi, 2
    mov rsi, rbx
    call .Lpf_buffer
    mov rdx, rax
    call .Lpf_disk
    test eax, eax
    jz 1f
    mov rdx, rbx
    mov esi, S_WRITE << 8 | FAILED
    call .Lpf_note_disk
1:  mov rsi, r14
    mov rdx, r12
    call .Lpf_commit
    inc qword ptr [rbp + C_BLOCK_CURSOR]
    inc qword ptr [rbp + C_BLOCK_WRITES]
    test qword ptr [rbp + C_BLOCK_WRITES], 63
    jnz 2f
    mov edi, 3
    mov rsi, rbx
    call .Lpf_disk
    test eax, eax
    jz 2f
    mov rdx, rbx
    mov esi, S_FLUSH << 8 | FAILED
    call .Lpf_note_disk
2:  pop r14
    pop rbx
9:  ret

# Which of rcx things is the rdi-th's turn, in rax: each once a cycle, scattered.
.Lpf_turn:
    mov rax, rdi
    xor edx, edx
    div rcx
    mov eax, 2654435761
    mul rdx
    div rcx
    mov rax, rdx
    ret

# The record of what is under way, and its end: item rsi, value rdx.
.Lpf_intend:
    mov [rbp + C_INTENT_VALUE], rdx
    inc rsi
    mov [rbp + C_INTENT], rsi
    mov [rbp + C_N], r12
    ret
.Lpf_commit:
    push rbx
    push r14
    mov rbx, rdx
    mov r14, [PROOF_GLOBALS + G_LEDGER]
    lea r14, [r14 + rsi*8]
    mov rdx, [r14]
    test rdx, rdx
    jz 1f
    call .Lpf_mix
    sub r13, rax
1:  mov rdx, rbx
    call .Lpf_mix
    add r13, rax
    mov [rbp + C_D], r13            # first: who looks from outside can tell both
    mov [r14], rbx
    mov qword ptr [rbp + C_INTENT], 0
    pop r14
    pop rbx
.Lpf_keep_copies:                   # N and D where only the device state has them
    mov ecx, 0xc0000102
    mov eax, r13d
    xor edx, edx
    wrmsr
    mov dr0, r13
    movups xmm7, [rbp + C_N]
    ret

# Memory must be of the same instant as the registers.
.Lpf_check_registers:
    mov rdx, [rbp + C_VCPU]
    mov esi, S_CONTROL << 8 | OLDER
    cmp r12, [rbp + C_N]
    ja 8f
    mov esi, S_CONTROL << 8 | NEWER
    jb 8f
    mov esi, S_REGISTER << 8 | DIFFERS
    cmp r13, [rbp + C_D]
    jne 8f
    mov rax, dr0
    mov esi, S_DEBUG << 8 | DIFFERS
    cmp rax, r13
    jne 8f
    movups [rbp + C_SSE], xmm7
    mov esi, S_SSE << 8 | DIFFERS
    cmp r12, [rbp + C_SSE]
    jne 8f
    cmp r13, [rbp + C_SSE + 8]
    jne 8f
    push rdx
    mov ecx, 0xc0000102
    rdmsr
    pop rdx
    mov esi, S_MSR << 8 | DIFFERS
    cmp eax, r13d
    jne 8f
    ret
8:  jmp .Lpf_note_memory

# Page item rdi against the ledger.
.Lpf_check_page:
    push rbx
    mov rbx, rdi
    call .Lpf_page_address
    mov rdi, rax
    mov rsi, rbx
    mov rdx, [PROOF_GLOBALS + G_LEDGER]
    mov rdx, [rdx + rbx*8]
    call .Lpf_check
    test eax, eax
    jz 1f
    lea esi, [rax + (S_PAGE << 8)]
    mov rdx, rbx
    call .Lpf_note_memory
1:  pop rbx
    ret

# Cache page under the cursor against the ledger: it was written by the device.
.Lpf_check_cache:
    push rbx
    call .Lpf_cache_item
    mov rbx, rax
    call .Lpf_cache_page
    mov rdi, rax
    mov rdx, [PROOF_GLOBALS + G_LEDGER]
    mov rdx, [rdx + rbx*8]
    mov rsi, rdx
    shr rsi, 40
    dec rsi
    add rsi, [PROOF_GLOBALS + G_PAGES]
    shl rdx, 24
    shr rdx, 24
    call .Lpf_check
    test eax, eax
    jz 1f
    lea esi, [rax + (S_CACHE << 8)]
    mov rdx, rbx
    sub rdx, [PROOF_GLOBALS + G_PAGES]
    sub rdx, [PROOF_GLOBALS + G_BLOCKS]
    call .Lpf_note_memory
1:  pop rbx
    ret

# Block rdi: reads it to the next cache page, checks that one before and after.
.Lpf_check_block:
    push rbx
    push r14
    push r15
    mov rbx, rdi
    inc qword ptr [rbp + C_CACHE_CURSOR]
    call .Lpf_check_cache
    mov r14, rbx
    add r14, [PROOF_GLOBALS + G_PAGES]
    mov r15, [PROOF_GLOBALS + G_LEDGER]
    mov r15, [r15 + r14*8]          # the block's sequence
    call .Lpf_cache_item
    mov rsi, rax
    lea rdx, [rbx + 1]
    shl rdx, 40
    or rdx, r15
    call .Lpf_intend
    call .Lpf_cache_page
    mov rdx, rax
    mov rsi, rbx
    mov edi, 1
    call .Lpf_disk
    test eax, eax
    jz 1f
    mov esi, S_READ << 8 | FAILED
    jmp 2f
1:  call .Lpf_cache_page
    mov rdi, rax
    mov rsi, r14
    mov rdx, r15
    call .Lpf_check
    test eax, eax
    jz 3f
    lea esi, [rax + (S_BLOCK << 8)]
2:  mov rdx, rbx
    call .Lpf_note_disk
3:  call .Lpf_cache_item
    mov rsi, rax
    lea rdx, [rbx + 1]
    shl rdx, 40
    or rdx, r15
    call .Lpf_commit
    pop r15
    pop r14
    pop rbx
    ret

# Fill page rdi.
.Lpf_check_fill:
    push rbx
    mov rbx, rdi
    call .Lpf_fill_seed
    mov rdi, rbx
    shl rdi, 12
    add rdi, [PROOF_GLOBALS + G_FILL_BASE]
    mov ecx, 512
    test bl, 1
    jz 2f
3:  proof_xorshift
    cmp rax, [rdi]
    jne 4f
    add rdi, 8
    dec ecx
    jnz 3b
    jmp 5f
2:  repe scasq
    je 5f
4:  mov rdx, rbx
    mov esi, S_FILL << 8 | DIFFERS
    call .Lpf_note_memory
5:  pop rbx
    ret

# A little of everything, each tenth of a second.
.Lpf_sweep:
    push rbx
    push r14
    mov r14d, 2
1:  mov rcx, [rbp + C_PAGES]
    test rcx, rcx
    jz 2f
    mov rax, [rbp + C_SWEEP_PAGE]
    inc qword ptr [rbp + C_SWEEP_PAGE]
    xor edx, edx
    div rcx
    mov rdi, rdx
    add rdi, [rbp + C_FIRST_PAGE]
    call .Lpf_check_page
    dec r14d
    jnz 1b
2:  mov rcx, [rbp + C_BLOCKS]
    mov rax, [rbp + C_SWEEP_BLOCK]
    inc qword ptr [rbp + C_SWEEP_BLOCK]
    test rcx, rcx
    jz 3f
    xor edx, edx
    div rcx
    mov rdi, rdx
    add rdi, [rbp + C_FIRST_BLOCK]
    call .Lpf_check_block
3:  cmp qword ptr [rbp + C_VCPU], 0
    jne 4f
    mov rdi, [rbp + C_SWEEP_BLOCK]
    and edi, FILL_PAGES - 1
    call .Lpf_check_fill
4:  pop r14
    pop rbx
    ret

# Everything of this vCPU, while the heart beats on; vCPU 0 says the outcome.
.Lpf_check_all:
    push rbx
    push r14
    push r15
    mov r14, [PROOF_GLOBALS + G_REQUEST]
    xor ebx, ebx
1:  cmp rbx, [rbp + C_PAGES]
    jae 2f
    mov rdi, [rbp + C_FIRST_PAGE]
    add rdi, rbx
    call .Lpf_check_page
    call .Lpf_beat_between
    inc rbx
    jmp 1b
2:  mov [rbp + C_PAGES_SEEN], rbx
    mov ebx, CACHE_SLOTS
3:  inc qword ptr [rbp + C_CACHE_CURSOR]
    call .Lpf_check_cache
    dec ebx
    jnz 3b
    call .Lpf_check_ledger          # before the cache pages' entries change
4:  cmp rbx, [rbp + C_BLOCKS]
    jae 5f
    mov rdi, [rbp + C_FIRST_BLOCK]
    add rdi, rbx
    call .Lpf_check_block
    call .Lpf_beat_between
    inc rbx
    jmp 4b
5:  mov [rbp + C_BLOCKS_SEEN], rbx
    cmp qword ptr [rbp + C_VCPU], 0
    jne 9f
    xor ebx, ebx
6:  mov rdi, rbx
    call .Lpf_check_fill
    call .Lpf_beat_between
    inc rbx
    cmp rbx, FILL_PAGES
    jb 6b
    add [rbp + C_PAGES_SEEN], rbx
    call .Lpf_code_sum
    cmp rax, [PROOF_GLOBALS + G_CODE]
    je 7f
    xor edx, edx
    mov esi, S_CODE << 8 | DIFFERS
    call .Lpf_note_memory
7:  call .Lpf_await_others
    mov [rbp + C_ANSWERED], r14
    call .Lpf_say_check
    jmp 8f
9:  mov [rbp + C_ANSWERED], r14
8:  call .Lpf_clock                 # what the load did not do in that time it never does
    mov [rbp + C_EPOCH], rax
    mov qword ptr [rbp + C_CHANGES], 0
    pop r15
    pop r14
    pop rbx
    ret

# The ledger's digest, made anew.
.Lpf_check_ledger:
    push rbx
    push r14
    push r15
    xor r15d, r15d
    mov rsi, [rbp + C_FIRST_PAGE]
    mov rbx, [rbp + C_PAGES]
    call 1f
    mov rsi, [rbp + C_FIRST_BLOCK]
    add rsi, [PROOF_GLOBALS + G_PAGES]
    mov rbx, [rbp + C_BLOCKS]
    call 1f
    mov rsi, [rbp + C_VCPU]
    shl rsi, 4
    add rsi, [PROOF_GLOBALS + G_PAGES]
    add rsi, [PROOF_GLOBALS + G_BLOCKS]
    mov ebx, CACHE_SLOTS
    call 1f
    cmp r15, r13
    je 5f
    mov rdx, [rbp + C_VCPU]
    mov esi, S_LEDGER << 8 | DIFFERS
    call .Lpf_note_memory
5:  pop r15
    pop r14
    pop rbx
    xor ebx, ebx
    ret
1:  mov r14, [PROOF_GLOBALS + G_LEDGER]
    lea r14, [r14 + rsi*8]
2:  test rbx, rbx
    jz 4f
    mov rdx, [r14]
    test rdx, rdx
    jz 3f
    call .Lpf_mix
    add r15, rax
3:  add r14, 8
    inc rsi
    dec rbx
    jmp 2b
4:  ret

# vCPU 0 waits for the other vCPUs' checks, 30 s at most, r14 the request.
.Lpf_await_others:
    push rbx
    push r15
    call .Lpf_clock
    mov r15d, eax
    mov ebx, 1
1:  cmp rbx, [PROOF_GLOBALS + G_VCPUS]
    jae 4f
    mov rax, rbx
    shl rax, 12
    cmp r14, [rax + PROOF_CONTROL + C_ANSWERED]
    je 3f
    call .Lpf_clock
    mov edi, eax
    sub eax, r15d
    cmp eax, 30000
    ja 2f
    call .Lpf_beat_if_due
    hlt
    jmp 1b
2:  mov rdx, rbx
    mov esi, S_VCPU << 8 | SILENT
    call .Lpf_note_memory
3:  inc rbx
    jmp 1b
4:  pop r15
    pop rbx
    ret

# One command to the disk: edi command, esi block, edx buffer. eax: 0 fine.
.Lpf_disk:
    mov ecx, edx
1:  mov eax, 1
    xchg rax, [PROOF_GLOBALS + G_LOCK]
    test eax, eax
    jz 2f
    pause
    jmp 1b
2:  mov eax, esi
    mov edx, 0x600
    out dx, eax
    mov eax, ecx
    mov edx, 0x604
    out dx, eax
    mov eax, edi
    mov edx, 0x608
    out dx, eax
    in eax, dx
    mov qword ptr [PROOF_GLOBALS + G_LOCK], 0
    ret

# What was typed: c checks everything, q ends the guest, t faults three times.
.Lpf_listen:
    mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 1f
    mov edx, 0x3f8
    in al, dx
    cmp al, 'c'
    jne 2f
    inc qword ptr [PROOF_GLOBALS + G_REQUEST]
1:  ret
2:  cmp al, 'q'
    jne 3f
    mov eax, 1
    mov edx, 0x620
    out dx, eax
    ret
3:  cmp al, 't'
    jne .Lpf_listen
    push 0
    push 0
    lidt [rsp]
    ud2

# In a long check: vCPU 0 looks at the clock now and then (rbx counts).
.Lpf_beat_between:
    test ebx, 31
    jnz 1f
    cmp qword ptr [rbp + C_VCPU], 0
    jne 1f
    call .Lpf_clock
    mov edi, eax
    jmp .Lpf_beat_if_due
1:  ret

# The heartbeat, when it is due at edi milliseconds; eax: 1 when it was.
.Lpf_beat_if_due:
    mov eax, edi
    sub eax, [PROOF_GLOBALS + G_DUE]
    jns 1f
    xor eax, eax
    ret
1:  mov rax, [PROOF_GLOBALS + G_DUE]
    add eax, 100
    mov ecx, edi
    sub ecx, eax
    js 2f
    mov eax, edi
2:  mov [PROOF_GLOBALS + G_DUE], rax
    inc qword ptr [PROOF_GLOBALS + G_BEAT]
    lea rsi, [rip + .Lpf_hb]
    call .Lpf_say
    mov rax, [PROOF_GLOBALS + G_BEAT]
    call .Lpf_say_number
    lea rsi, [rip + .Lpf_seq]
    mov edi, C_PAGE_WRITES
    call .Lpf_say_sum
    lea rsi, [rip + .Lpf_block]
    mov edi, C_BLOCK_WRITES
    call .Lpf_say_sum
    call .Lpf_say_verdicts
    call .Lpf_say_end
    mov eax, 1
    ret

.Lpf_say_check:
    lea rsi, [rip + .Lpf_check_word]
    call .Lpf_say
    mov rax, [PROOF_GLOBALS + G_BEAT]
    call .Lpf_say_number
    call .Lpf_say_verdicts
    lea rsi, [rip + .Lpf_pages]
    mov edi, C_PAGES_SEEN
    call .Lpf_say_sum
    lea rsi, [rip + .Lpf_blocks]
    mov edi, C_BLOCKS_SEEN
    call .Lpf_say_sum
.Lpf_say_end:
    mov al, 10
    jmp .Lpf_say_byte

# Says rsi, then the sum over all vCPUs of the word at rdi in their control pages.
.Lpf_say_sum:
    call .Lpf_say
    xor eax, eax
    xor ecx, ecx
1:  mov rdx, rcx
    shl rdx, 12
    add rax, [rdx + rdi + PROOF_CONTROL]
    inc rcx
    cmp rcx, [PROOF_GLOBALS + G_VCPUS]
    jb 1b
    jmp .Lpf_say_number

.Lpf_say_verdicts:
    lea rsi, [rip + .Lpf_mem]
    mov edi, C_MEM_FAULT
    call .Lpf_say_verdict
    lea rsi, [rip + .Lpf_disk_word]
    mov edi, C_DISK_FAULT
.Lpf_say_verdict:                   # rsi the word before, rdi whose fault
    push rbx
    call .Lpf_say
    xor ecx, ecx
1:  mov rdx, rcx
    shl rdx, 12
    mov rbx, [rdx + rdi + PROOF_CONTROL]
    test rbx, rbx
    jnz 2f
    inc rcx
    cmp rcx, [PROOF_GLOBALS + G_VCPUS]
    jb 1b
    lea rsi, [rip + .Lpf_ok]
    call .Lpf_say
    pop rbx
    ret
2:  lea rsi, [rip + .Lpf_bad]
    call .Lpf_say
    mov rcx, rbx
    shr rcx, 56
    lea rsi, [rip + .Lpf_subjects]
    call .Lpf_say_nth
    mov rax, rbx
    shl rax, 16
    shr rax, 16
    call .Lpf_say_number
    mov al, '-'
    call .Lpf_say_byte
    mov rcx, rbx
    shr rcx, 48
    movzx ecx, cl
    lea rsi, [rip + .Lpf_reasons]
    call .Lpf_say_nth
    pop rbx
    ret

# Says the text rsi; the rcx-th (from 1) of texts at rsi; the number rax; the byte al.
.Lpf_say_nth:
    dec ecx
    jz .Lpf_say
1:  mov al, [rsi]
    inc rsi
    test al, al
    jnz 1b
    jmp .Lpf_say_nth
.Lpf_say:
    mov al, [rsi]
    inc rsi
    test al, al
    jz 1f
    call .Lpf_say_byte
    jmp .Lpf_say
1:  ret
.Lpf_say_number:
    xor r8d, r8d
    mov ecx, 10
1:  xor edx, edx
    div rcx
    add edx, '0'
    push rdx
    inc r8d
    test rax, rax
    jnz 1b
2:  pop rax
    call .Lpf_say_byte
    dec r8d
    jnz 2b
    ret
.Lpf_say_byte:
    mov edx, 0x3f8
    out dx, al
    ret

.Lpf_hb: .asciz "HB "
.Lpf_seq: .asciz " seq="
.Lpf_block: .asciz " block="
.Lpf_mem: .asciz " mem="
.Lpf_disk_word: .asciz " disk="
.Lpf_check_word: .asciz "CHECK "
.Lpf_pages: .asciz " pages="
.Lpf_blocks: .asciz " blocks="
.Lpf_ok: .asciz "ok"
.Lpf_bad: .asciz "BAD:"
.Lpf_subjects:
    .asciz "page-"
    .asciz "block-"
    .asciz "cache-"
    .asciz "fill-"
    .asciz "ledger-"
    .asciz "register-"
    .asciz "msr-"
    .asciz "debug-"
    .asciz "sse-"
    .asciz "clock-"
    .asciz "code-"
    .asciz "vcpu-"
    .asciz "read-"
    .asciz "write-"
    .asciz "control-"
    .asciz "flush-"
.Lpf_reasons:
    .asciz "lost"
    .asciz "swapped"
    .asciz "older"
    .asciz "newer"
    .asciz "torn"
    .asciz "failed"
    .asciz "differs"
    .asciz "silent"
.balign 8
farhaven_proof_end:
