//! From permissions to a program for the kernel's packet filter machine (classic BPF, seccomp(2)).
//!
//! A filter is a tree of comparisons of the call's number. The kernel runs it once for each system call that there is, when it is put on a
//! thread, to know which need not be filtered at all: a list instead of a tree takes several times as long.

use std::collections::BTreeMap;

/// One instruction: code, jump if true, jump if false, constant (`struct sock_filter` of linux/filter.h).
pub(crate) type Instruction = (u16, u8, u8, u32);

/// What is tested of an argument's low 32 bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Test {
    /// They are this.
    Equals(u32),
    /// None of these bits is set.
    Without(u32),
}

/// For which arguments a call is allowed: one of these tests holds; without tests for all.
pub(crate) type Tests = Vec<(u8, Test)>;

/// What a thread may do, by number of the system call.
pub(crate) type Permissions = BTreeMap<u32, Tests>;

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_NOT_LESS: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

// SECCOMP_RET_* of linux/seccomp.h.
const KILL_PROCESS: Instruction = (RETURN, 0, 0, 0x8000_0000);
const TRAP: Instruction = (RETURN, 0, 0, 0x0003_0000);
const ALLOW: Instruction = (RETURN, 0, 0, 0x7fff_0000);

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// AUDIT_ARCH_X86_64 of linux/audit.h.
const X86_64: u32 = 0xc000_003e;

/// The program that allows these and traps all others.
pub(crate) fn program(permissions: &Permissions) -> Vec<Instruction> {
    let leaves: Vec<_> = permissions.iter().map(|(number, tests)| (*number, allowed_for(tests))).collect();
    let mut program =
        vec![(LOAD, 0, 0, ARCHITECTURE), (IF_EQUAL, 1, 0, X86_64), KILL_PROCESS, (LOAD, 0, 0, NUMBER)];
    program.extend(tree(&leaves));
    program
}

/// Finds the call's number, which is loaded, among those of `leaves`, which are sorted. Every way through it ends.
fn tree(leaves: &[(u32, Vec<Instruction>)]) -> Vec<Instruction> {
    match leaves {
        [] => vec![TRAP],
        [(number, code)] => [&[(IF_EQUAL, 1, 0, *number), TRAP], code.as_slice()].concat(),
        more => {
            let (low, high) = more.split_at(more.len() / 2);
            let first = high.first().map_or(0, |(number, _)| *number);
            let low = tree(low);
            // Conditional jumps do not reach far.
            let over = (JUMP, 0, 0, u32::try_from(low.len()).unwrap_or(u32::MAX));
            [&[(IF_NOT_LESS, 0, 1, first), over], low.as_slice(), &tree(high)].concat()
        }
    }
}

fn allowed_for(tests: &Tests) -> Vec<Instruction> {
    if tests.is_empty() {
        return vec![ALLOW];
    }
    let mut code = Vec::new();
    let mut loaded = None;
    for (argument, test) in tests {
        if loaded != Some(argument) {
            code.push((LOAD, 0, 0, ARGUMENTS + 8 * u32::from(*argument)));
            loaded = Some(argument);
        }
        code.push(match test {
            Test::Equals(value) => (IF_EQUAL, 0, 1, *value),
            Test::Without(bits) => (IF_ANY_BIT, 1, 0, *bits),
        });
        code.push(ALLOW);
    }
    code.push(TRAP);
    code
}
