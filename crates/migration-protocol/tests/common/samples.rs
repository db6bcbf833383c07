//! One of each message and of each bulk frame: for golden bytes, and as the seeds of mutators.

use vmm_migration_protocol::{
    Absent, Accept, Bulk, Command, CpuNeeds, CpuidLeaf, DescriptorRange, Fault, Features, Hello, Join, Mark,
    MemoryLayout, MemoryRange, Message, Missing, MissingKind, Offer, PAGE, Progress, Purpose, Reason, Region,
    SessionId, SessionOutcome, Sums, Versions, Zero, contents_checksum,
};

use super::Whole;

pub(crate) const SESSION: SessionId = SessionId(*b"0123456789abcdef");

pub(crate) fn range(gpa: u64, length: u64) -> MemoryRange {
    MemoryRange::new(gpa, length).unwrap()
}

/// Two regions with a hole between them: 8 and 4 pages.
pub(crate) fn layout() -> MemoryLayout {
    let region = |gpa, pages| Region { gpa, length: pages * PAGE, zone: "zone0".to_owned() };
    MemoryLayout::new(vec![region(0, 8), region(0x10_0000, 4)]).unwrap()
}

pub(crate) fn hello() -> Hello {
    let cpuid = vec![CpuidLeaf {
        leaf: 1,
        subleaf: 0,
        registers: [0x000a_0652, 0x0010_0800, 0xfffa_3203, 0x178b_fbff],
    }];
    Hello {
        versions: Versions::OURS,
        session: SESSION,
        purpose: Purpose::Migrate,
        features: Features::LZ4.and(Features::UNCHECKED_MEMORY),
        required: Features::NONE,
        connections: 1,
        memory: layout(),
        cpu: CpuNeeds { vcpus: 2, phys_bits: 46, tsc_khz: 2_100_000, cpuid },
        program: "vmm 0.1.0".to_owned(),
    }
}

pub(crate) fn offer() -> Offer {
    Offer {
        versions: Versions::OURS,
        features: Features::LZ4.and(Features::LOCAL_MEMORY).and(Features::POST_COPY),
        connections: 4,
        program: "vmm 0.1.0".to_owned(),
    }
}

pub(crate) fn accept() -> Accept {
    offer().answer(&hello()).unwrap()
}

/// One message of each command that is no bulk, in the order of the numbers.
pub(crate) fn messages() -> Vec<Message> {
    let missing = vec![
        Missing::new(MissingKind::Device, "_disk0"),
        Missing::new(MissingKind::Cpu, "cpuid 7.0 ebx bit 16"),
    ];
    let list = vec![DescriptorRange { range: range(0, 8 * PAGE), offset: 0x20_0000, descriptor: 1 }];
    let messages = vec![
        Message::Start,
        Message::Config(b"{}".to_vec()),
        Message::State(b"\xa0".to_vec()),
        Message::Complete,
        Message::Abandon(Fault::new(Reason::Cancelled, "by the operator")),
        Message::Hello(Box::new(hello())),
        Message::Ack(Command::Config),
        Message::Nack(Command::Config, Fault::incompatible(missing)),
        Message::Ready(SESSION),
        Message::Commit { session: SESSION, run: true },
        Message::Query(SESSION),
        Message::Outcome(SESSION, SessionOutcome::Aborted),
        Message::Accept(accept()),
        Message::Join(Join { session: SESSION, index: 3, role: 0 }),
        Message::Mark(Mark { pass: 2, last: true, bytes: 3 * PAGE }),
        Message::Landed(2),
        Message::Zero(Zero { range: range(0x10_0000, PAGE), pass: 2 }),
        Message::Again(range(PAGE, 2 * PAGE)),
        Message::Descriptors(list),
        Message::Keepalive(Progress { bytes: 7 * PAGE, pass: 2, blackout_ms: 12 }),
        Message::Cancel(Fault::new(Reason::Cancelled, "by the receiver's operator")),
        Message::Committed(SESSION),
        Message::Sums(Sums { range: range(PAGE, 2 * PAGE), pass: 1, sums: vec![0x1122_3344, 7] }),
        Message::Absent(Absent { range: range(0x10_0000, 2 * PAGE), pass: 3 }),
        Message::Want(range(0x10_0000, PAGE)),
        Message::Whole(SESSION),
        Message::Rejoin(SESSION),
        Message::Lacks(range(PAGE, PAGE)),
    ];
    let commands: Vec<Command> = messages.iter().map(Message::command).collect();
    let expected: Vec<Command> = Command::ALL.into_iter().filter(|command| !command.is_bulk()).collect();
    assert_eq!(commands, expected, "one message of each");
    messages
}

/// One frame of each command, with what it is called.
pub(crate) fn frames() -> Vec<(Command, Whole)> {
    let page = vec![0x5a; PAGE as usize];
    let memory = Bulk::memory(range(PAGE, PAGE), 1, contents_checksum([&page[..]])).unwrap();
    let packed = Bulk::packed(range(PAGE, 2 * PAGE), 1, contents_checksum([&b"small"[..]]), 5).unwrap();
    let plain =
        messages().into_iter().map(|message| (message.command(), Whole::Frame(message.encode().unwrap())));
    plain
        .chain([
            (Command::Memory, Whole::Bulk(memory, page)),
            (Command::Packed, Whole::Bulk(packed, b"small".to_vec())),
        ])
        .collect()
}
