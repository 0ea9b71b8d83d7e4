//! Stopping vCPUs: all of them, at once, with nothing left half done.

use kvm_ioctls::VcpuExit;

use super::*;
use crate::guest::embedded::VmmError;
use crate::guest::kvm::gate::{Gates, Turn};

#[test]
fn all_vcpus_stand_whatever_they_do() {
    if !here() {
        return;
    }
    // rdi is the vCPU: the odd ones rest, the even ones count in a page of their own.
    // test edi, 1; jnz h; mov rax, 2 MiB; shl rdi, 12; add rax, rdi; l: inc qword [rax]; jmp l
    // h: hlt; jmp h
    let program = Code::default()
        .raw(&[0xf7, 0xc7, 1, 0, 0, 0, 0x75, 22])
        .rax(2 * MIB)
        .raw(&[
            0x48, 0xc1, 0xe7, 12, 0x48, 0x01, 0xf8, 0x48, 0xff, 0x00, 0xeb, 0xfb,
        ])
        .raw(&[0xf4, 0xeb, 0xfd]);
    for irqchip in [false, true] {
        let shape = Shape {
            vcpus: 4,
            irqchip,
            ..SMALL
        };
        let mut guest = Guest::running(shape, &program.0);
        let counts = |guest: &Guest| [0, 2].map(|vcpu| guest.word(2 * MIB + vcpu * 4096));
        wait("both to count", || {
            counts(&guest).iter().all(|count| *count > 0)
        });
        for _ in 0..10 {
            guest.vmm.pause().unwrap();
            let stand = counts(&guest);
            std::thread::sleep(Duration::from_millis(3));
            assert_eq!(counts(&guest), stand);
            let state = guest.vmm.save().unwrap();
            assert_eq!(guest.vmm.save().unwrap(), state);
            guest.vmm.resume().unwrap();
            wait("both to go on", || {
                counts(&guest)
                    .iter()
                    .zip(stand)
                    .all(|(now, then)| *now > then)
            });
        }
        guest.vmm.pause().unwrap();
        let mut twin = guest.twin(shape);
        let stand = counts(&twin);
        twin.vmm.resume().unwrap();
        wait("both to go on there", || {
            counts(&twin)
                .iter()
                .zip(stand)
                .all(|(now, then)| *now > then)
        });
        guest.vmm.end();
        assert_eq!(guest.vmm.running(), None);
    }
}

/// Types 0, 1, 2 and so on for ever.
#[derive(Default)]
struct Counting(Mutex<u8>, Paper);

impl Terminal for Counting {
    fn write(&self, bytes: &[u8]) {
        self.1.write(bytes);
    }

    fn typed(&self) -> Option<u8> {
        let mut next = self.0.lock().unwrap();
        let byte = *next;
        *next = next.wrapping_add(1);
        Some(byte)
    }
}

#[test]
fn a_port_access_under_way_is_ended_before_the_state_is_taken() {
    if !here() {
        return;
    }
    // Reads bytes and looks that none is lost or comes twice: mov rsi, 2 MiB; mov dx, 0x3f8;
    // xor ebx, ebx; l: in al, dx; cmp al, bl; jne f; inc bl; inc qword [rsi]; jmp l;
    // f: mov al, 'E'; out dx, al; jmp $
    let program = Code::default()
        .raw(&[0x48, 0xbe])
        .raw(&(2 * MIB).to_le_bytes())
        .raw(&[0x66, 0xba, 0xf8, 0x03, 0x31, 0xdb])
        .raw(&[
            0xec, 0x38, 0xd8, 0x75, 7, 0xfe, 0xc3, 0x48, 0xff, 0x06, 0xeb, 0xf4,
        ])
        .raw(&[0xb0, b'E', 0xee])
        .spin();
    let keys = Arc::new(Counting::default());
    let mut ram = tempfile::tempfile().unwrap();
    ram.set_len(SMALL.ram).unwrap();
    let mut vmm = machine(SMALL, &ram, Some(&program.0), keys.clone(), None);
    let word = |vmm: &KvmVmm| {
        let mut bytes = [0; 8];
        vmm.read_ram(0, 2 * MIB, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    for _ in 0..25 {
        let before = word(&vmm);
        vmm.resume().unwrap();
        wait("bytes to be read", || word(&vmm) > before + 20);
        vmm.pause().unwrap();
        let state = vmm.save().unwrap();
        ram = copy(&ram, SMALL.ram);
        vmm = machine(SMALL, &ram, None, keys.clone(), None);
        vmm.restore(&state).unwrap();
        assert_eq!(keys.1.text(), "", "a byte was lost or came twice");
    }
}

#[test]
fn a_string_of_bytes_is_written_whole() {
    if !here() {
        return;
    }
    let text = b"one instruction, many bytes;";
    // mov rsi, 1 MiB + 23; mov ecx, length; mov dx, 0x3f8; rep outsb; jmp $
    let mut program = Code::default()
        .raw(&[0x48, 0xbe])
        .raw(&(MIB + 23).to_le_bytes())
        .raw(&[
            0xb9,
            text.len() as u8,
            0,
            0,
            0,
            0x66,
            0xba,
            0xf8,
            0x03,
            0xf3,
            0x6e,
        ])
        .spin();
    assert_eq!(program.0.len(), 23);
    program = program.raw(text);
    let guest = Guest::running(SMALL, &program.0);
    guest.paper.wait_for("one instruction, many bytes;");
}

#[test]
fn a_vcpu_that_does_not_stop_is_named_and_the_others_go_on() {
    if !here() {
        return;
    }
    // A vCPU whose monitor is busy elsewhere, beside one that goes round.
    let kvm = kvm_ioctls::Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let (gates, each) = Gates::new(2);
    let turns = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (busy, free) = std::sync::mpsc::channel::<()>();
    let mut each = each.into_iter();
    let (mut first, second) = (each.next().unwrap(), each.next().unwrap());
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let counted = turns.clone();
    let one = std::thread::spawn(move || {
        loop {
            match first.run(&mut vcpu) {
                // Without memory it can do nothing but fail at its first instruction.
                Ok(Turn::Exit(VcpuExit::MmioRead(_, data))) => data.fill(0x90),
                Ok(Turn::End) => return,
                _ => {}
            }
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let two = std::thread::spawn(move || {
        let _ = free.recv();
        drop(second);
    });
    gates.resume();
    let now = || turns.load(std::sync::atomic::Ordering::Relaxed);
    wait("the first to run", || now() > 0);
    let error = gates.pause(Duration::from_millis(50)).unwrap_err();
    assert!(
        matches!(&error, VmmError::DoesNotStop { what, .. } if what == "vCPU 1"),
        "{error}"
    );
    let then = now();
    wait("the first to go on", || now() > then);
    drop(busy);
    two.join().unwrap();
    one.join().unwrap();
    assert!(gates.ended_because().unwrap().contains("vCPU 1"));
    assert!(gates.wait_until_gone(Duration::from_secs(1)));
}

#[test]
fn nothing_is_done_on_a_running_vcpu() {
    if !here() {
        return;
    }
    let mut guest = Guest::running(SMALL, &Code::default().spin().0);
    assert!(matches!(guest.vmm.save(), Err(VmmError::State(_))));
    guest.vmm.pause().unwrap();
    guest.vmm.pause().unwrap();
    guest.vmm.save().unwrap();
}
