//! From permissions to a program for the kernel's packet filter machine (classic BPF, seccomp(2)).
//!
//! A filter is a tree of comparisons of the call's number, down to ranges of numbers that are judged alike. The kernel
//! runs it once for each system call that there is, when it is put on a thread, to know which need not be filtered at
//! all, and compiles it: a list takes several times as long as a tree, and a tree down to each number twice as long.

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
    let mut program =
        vec![(LOAD, 0, 0, ARCHITECTURE), (IF_EQUAL, 1, 0, X86_64), KILL_PROCESS, (LOAD, 0, 0, NUMBER)];
    program.extend(tree(&ranges(permissions)));
    program
}

/// All numbers, as ranges: the first number, and the code for it and those after it.
fn ranges(permissions: &Permissions) -> Vec<(u32, Vec<Instruction>)> {
    let mut ranges: Vec<(u32, Vec<Instruction>)> = Vec::new();
    let mut add = |first, code| match ranges.last() {
        Some((_, last)) if *last == code => {}
        _ => ranges.push((first, code)),
    };
    let mut next = 0;
    for (number, tests) in permissions {
        if *number > next {
            add(next, vec![TRAP]);
        }
        add(*number, allowed_for(tests));
        next = number.saturating_add(1);
    }
    add(next, vec![TRAP]);
    ranges
}

/// Finds the range of the call's number, which is loaded. Every way through it ends.
fn tree(ranges: &[(u32, Vec<Instruction>)]) -> Vec<Instruction> {
    match ranges {
        [] => vec![TRAP],
        [(_, code)] => code.clone(),
        more => {
            let (low, high) = more.split_at(more.len() / 2);
            let first = high.first().map_or(0, |(number, _)| *number);
            let (low, high) = (tree(low), tree(high));
            let branch = match u8::try_from(low.len()) {
                Ok(over) => vec![(IF_NOT_LESS, over, 0, first)],
                // Conditional jumps do not reach that far.
                Err(_) => {
                    let over = u32::try_from(low.len()).unwrap_or(u32::MAX);
                    vec![(IF_NOT_LESS, 0, 1, first), (JUMP, 0, 0, over)]
                }
            };
            [branch, low, high].concat()
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
