//! The guest on a real KVM, by programs of a few bytes. Where there is no KVM
//! these tests say so and do nothing.

mod building;
mod figures;
mod gates;
mod machine;
mod refusals;
mod states;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::facts::facts;
use super::machine::{Pace, Parts, Terminal, assemble};
use super::protected::KvmVmm;
use crate::guest::embedded::Vmm;
use crate::guest::embedded::disk::TrackedDisk;

/// A console on paper.
#[derive(Default)]
struct Paper {
    written: Mutex<Vec<u8>>,
    keys: Mutex<VecDeque<u8>>,
}

impl Terminal for Paper {
    fn write(&self, bytes: &[u8]) {
        self.written.lock().unwrap().extend(bytes);
    }

    fn typed(&self) -> Option<u8> {
        self.keys.lock().unwrap().pop_front()
    }
}

impl Paper {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.written.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, text: &str) {
        wait(text, || self.text().contains(text));
    }
}

fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !until() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

const MIB: u64 = 1 << 20;

/// Is there a KVM? Says so when not.
fn here() -> bool {
    match facts() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: {error}");
            false
        }
    }
}

/// How to make a guest in a test.
#[derive(Clone, Copy)]
struct Shape {
    vcpus: u32,
    ram: u64,
    irqchip: bool,
}

const SMALL: Shape = Shape {
    vcpus: 1,
    ram: 16 * MIB,
    irqchip: false,
};

struct Guest {
    vmm: KvmVmm,
    paper: Arc<Paper>,
    ram: File,
}

impl Guest {
    fn assemble(shape: Shape, ram: File, program: Option<&[u8]>) -> Self {
        let paper = Arc::new(Paper::default());
        let vmm = machine(shape, &ram, program, paper.clone(), None);
        Self { vmm, paper, ram }
    }

    /// At the program's begin, held.
    fn new(shape: Shape, program: &[u8]) -> Self {
        let ram = tempfile::tempfile().unwrap();
        ram.set_len(shape.ram).unwrap();
        Self::assemble(shape, ram, Some(program))
    }

    fn running(shape: Shape, program: &[u8]) -> Self {
        let mut guest = Self::new(shape, program);
        guest.vmm.resume().unwrap();
        guest
    }

    /// Another machine with a copy of this one's memory and its state, held.
    fn twin(&mut self, shape: Shape) -> Self {
        let state = self.vmm.save().unwrap();
        let mut twin = self.empty_twin(shape);
        twin.vmm.restore(&state).unwrap();
        twin
    }

    fn empty_twin(&self, shape: Shape) -> Self {
        Self::assemble(shape, copy(&self.ram, shape.ram), None)
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.vmm.read_ram(0, at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// Another file with the same bytes.
fn copy(ram: &File, bytes: u64) -> File {
    use std::os::unix::fs::FileExt;
    let copy = tempfile::tempfile().unwrap();
    copy.set_len(bytes).unwrap();
    let mut piece = vec![0; MIB as usize];
    for at in (0..bytes).step_by(MIB as usize) {
        ram.read_exact_at(&mut piece, at).unwrap();
        if piece.iter().any(|byte| *byte != 0) {
            copy.write_all_at(&piece, at).unwrap();
        }
    }
    copy
}

const PACE: Pace = Pace {
    changes: 7,
    pages: 8,
    blocks: 9,
};

fn machine(
    shape: Shape,
    ram: &File,
    program: Option<&[u8]>,
    terminal: Arc<dyn Terminal>,
    disk: Option<Arc<TrackedDisk>>,
) -> KvmVmm {
    let parts = Parts {
        vcpus: shape.vcpus,
        ram: shape.ram,
        ram_file: ram.try_clone().unwrap(),
        disk,
        terminal,
        pace: if program.is_some() {
            PACE
        } else {
            Pace::default()
        },
        irqchip: shape.irqchip,
    };
    assemble(parts, &facts().unwrap(), program).unwrap()
}

/// A few instructions, as bytes.
#[derive(Default, Clone)]
struct Code(Vec<u8>);

impl Code {
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// mov rax, value
    fn rax(self, value: u64) -> Self {
        self.raw(&[0x48, 0xb8]).raw(&value.to_le_bytes())
    }

    /// mov rcx, value
    fn rcx(self, value: u64) -> Self {
        self.raw(&[0x48, 0xb9]).raw(&value.to_le_bytes())
    }

    /// mov edx, port; out dx, eax after mov eax, value
    fn out(self, port: u16, value: u32) -> Self {
        self.raw(&[0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0x66, 0xba])
            .raw(&port.to_le_bytes())
            .raw(&[0xef])
    }

    /// in eax, port; then mov [at], eax
    fn keep(self, port: u16, at: u32) -> Self {
        self.raw(&[0x66, 0xba])
            .raw(&port.to_le_bytes())
            .raw(&[0xed, 0x89, 0x04, 0x25])
            .raw(&at.to_le_bytes())
    }

    /// Waits for a key.
    fn key(self) -> Self {
        self.raw(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb])
            .raw(&[0x66, 0xba, 0xf8, 0x03, 0xec])
    }

    /// Writes a letter to the console.
    fn say(self, letter: u8) -> Self {
        self.raw(&[0xb0, letter, 0x66, 0xba, 0xf8, 0x03, 0xee])
    }

    /// Goes round for ever.
    fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Writes to `count` pages from `at` on.
    fn touch(self, at: u64, count: u64) -> Self {
        // l: mov [rax], rcx; add rax, 4096; dec rcx; jnz l
        self.rcx(count).rax(at).raw(&[
            0x48, 0x89, 0x08, 0x48, 0x05, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xf2,
        ])
    }

    /// Counts up the word at `at` for ever.
    fn count(self, at: u64) -> Self {
        self.rax(at).raw(&[0x48, 0xff, 0x00, 0xeb, 0xfb])
    }
}
