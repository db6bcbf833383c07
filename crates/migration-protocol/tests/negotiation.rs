//! What two ends agree on, and what a receiver of memory lets land.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use proptest::prelude::*;
use vmm_migration_protocol::{
    Absent, Accept, Barrier, Bulk, CHUNK, Command, Features, Frame, Hello, Intake, MAX_REGIONS, Mark,
    MemoryError, MemoryLayout, MemoryRange, Message, Offer, PAGE, Reason, Region, SessionId, Sums, Versions,
    Zero,
};

use common::samples::{self, SESSION, hello, layout, offer, range};

mod common;

fn region(gpa: u64, length: u64) -> Region {
    Region { gpa, length, zone: String::new() }
}

#[test]
fn refusals_say_why() {
    let newer = Versions { least: 2, most: 3 };
    let cases = [
        (Hello { versions: newer, ..hello() }, Reason::Version),
        (Hello { required: Features::UNCHECKED_MEMORY, ..hello() }, Reason::Features),
        (Hello { connections: 0, ..hello() }, Reason::Violation),
        (Hello { connections: 129, ..hello() }, Reason::Violation),
    ];
    for (hello, reason) in cases {
        let fault = offer().answer(&hello).unwrap_err();
        assert_eq!(fault.reason(), reason, "{fault}");
    }
    let fault = offer().answer(&Hello { versions: newer, ..hello() }).unwrap_err();
    assert_eq!(fault.text(), "the source speaks 2 to 3, the destination 1 to 1");
}

#[test]
fn neighbouring_versions_meet() {
    let old = Versions { least: 1, most: 2 };
    let new = Versions { least: 2, most: 3 };
    assert_eq!((old.common(new), new.common(old)), (Some(2), Some(2)));
    assert_eq!(Versions { least: 3, most: 2 }.common(new), None);
}

#[test]
fn connections_are_bounded_by_both_and_by_sixteen() {
    let agreed = |asked, possible, features| {
        let hello = Hello { connections: asked, features, ..hello() };
        Offer { connections: possible, ..offer() }.answer(&hello).unwrap().connections
    };
    assert_eq!(agreed(128, 128, Features::NONE), 16);
    assert_eq!(agreed(3, 128, Features::NONE), 3);
    assert_eq!(agreed(8, 2, Features::NONE), 2);
    assert_eq!(agreed(8, 0, Features::NONE), 1);
    assert_eq!(agreed(8, 8, Features::LOCAL_MEMORY), 1);
}

#[test]
fn memory_is_handed_over_or_follows_later_and_not_both() {
    let both = Features::LOCAL_MEMORY.and(Features::POST_COPY);
    let fault = offer().answer(&Hello { features: both, required: both, ..hello() }).unwrap_err();
    assert_eq!(fault.reason(), Reason::Features);
    let said = Hello { features: both, ..hello() };
    let accept = |features| Accept { features, ..samples::accept() };
    assert!(accept(Features::POST_COPY).fits(&said) && accept(Features::LOCAL_MEMORY).fits(&said));
    assert!(!accept(both).fits(&said));
}

#[test]
fn one_way_to_compress_is_agreed_on() {
    let both = Features::LZ4.and(Features::ZSTD);
    let agreed = |required| {
        let hello = Hello { features: both, required, ..hello() };
        Offer { features: both, ..offer() }.answer(&hello).map(|accept| accept.features)
    };
    assert_eq!(agreed(Features::NONE), Ok(Features::LZ4));
    assert_eq!(agreed(Features::ZSTD), Ok(Features::ZSTD));
    assert_eq!(agreed(both).unwrap_err().reason(), Reason::Features);
    let hello = Hello { features: both, ..hello() };
    assert!(
        !Accept { features: both, ..Offer { features: both, ..offer() }.answer(&hello).unwrap() }
            .fits(&hello)
    );
}

#[test]
fn a_source_believes_only_what_it_offered() {
    let hello = Hello { connections: 20, required: Features::LZ4, ..hello() };
    let good = Offer { connections: 16, ..offer() }.answer(&hello).unwrap();
    assert!(good.fits(&hello));
    let wrong = [
        Accept { version: 0, ..good.clone() },
        Accept { version: 2, ..good.clone() },
        Accept { session: SessionId([0; 16]), ..good.clone() },
        Accept { features: Features::ZSTD.and(Features::LZ4), ..good.clone() },
        Accept { features: Features::NONE, ..good.clone() },
        Accept { connections: 0, ..good.clone() },
        Accept { connections: 17, ..good.clone() },
    ];
    for accept in wrong {
        assert!(!accept.fits(&hello), "{accept:?}");
    }
}

#[test]
fn impossible_layouts_are_refused() {
    let end = u64::MAX - PAGE + 1;
    let cases = [
        vec![region(1, PAGE)],
        vec![region(0, 0)],
        vec![region(0, PAGE - 1)],
        vec![region(end, PAGE)],
        vec![region(0, 2 * PAGE), region(PAGE, PAGE)],
        vec![region(2 * PAGE, PAGE), region(0, PAGE)],
        vec![region(0, PAGE), region(0, PAGE)],
        (0..=MAX_REGIONS as u64).map(|index| region(index * PAGE, PAGE)).collect(),
    ];
    for regions in cases {
        assert!(MemoryLayout::new(regions.clone()).is_err(), "{regions:?}");
    }
    assert_eq!(layout().bytes(), 12 * PAGE);
}

#[test]
fn only_what_lies_in_one_region_lands() {
    let layout = layout();
    for (gpa, pages, inside) in [
        (0, 8, true),
        (7, 1, true),
        (7, 2, false),
        (8, 1, false),
        (256, 4, true),
        (256, 5, false),
        (255, 2, false),
    ] {
        let range = range(gpa * PAGE, pages * PAGE);
        let found = Intake::new(&layout).zero(Zero { range, pass: 0 });
        let expected = MemoryError::Outside { gpa: range.gpa(), length: range.length() };
        assert_eq!(found, if inside { Ok(()) } else { Err(expected) }, "{gpa} {pages}");
    }
}

#[test]
fn a_pass_is_bounded_counted_and_in_order() {
    let layout = layout();
    let mut intake = Intake::new(&layout);
    let whole = Bulk::memory(range(0, 8 * PAGE), 0, 0).unwrap();
    intake.bulk(&whole).unwrap();
    assert_eq!(intake.bulk(&whole), Err(MemoryError::Excess { pass: 0 }));
    let mark = Mark { pass: 0, last: false, bytes: 8 * PAGE };
    let missing = MemoryError::Missing { sent: 9 * PAGE, received: 8 * PAGE };
    assert_eq!(intake.mark(Mark { bytes: 9 * PAGE, ..mark }), Err(missing));
    assert_eq!(intake.mark(Mark { pass: 1, ..mark }), Err(MemoryError::Pass { found: 1, now: 0 }));
    intake.mark(mark).unwrap();
    assert_eq!(intake.bulk(&whole), Err(MemoryError::Pass { found: 0, now: 1 }), "a page of the pass before");
    intake.mark(Mark { pass: 1, last: true, bytes: 0 }).unwrap();
    let after = Bulk::memory(range(0, PAGE), 2, 0).unwrap();
    assert_eq!(
        intake.bulk(&after),
        Err(MemoryError::Pass { found: 2, now: 2 }),
        "nothing after the last pass"
    );
    assert!(intake.mark(Mark { pass: 2, last: true, bytes: 0 }).is_err());
}

#[test]
fn only_the_last_pass_leaves_memory_out() {
    let layout = layout();
    let absent = |gpa, pass| Absent { range: range(gpa, PAGE), pass };
    let mut intake = Intake::new(&layout);
    assert!(intake.absent(absent(8 * PAGE, 0)).is_err(), "no memory of the guest's");
    intake.absent(absent(0, 0)).unwrap();
    let mark = Mark { pass: 0, last: false, bytes: PAGE };
    assert_eq!(intake.mark(mark), Err(MemoryError::Absent { pass: 0 }));
    intake.mark(Mark { last: true, ..mark }).unwrap();
}

#[test]
fn a_pass_ends_when_it_has_ended_everywhere() {
    let mut barrier = Barrier::new(3, 4 * PAGE);
    for pass in 0..2 {
        assert_eq!(barrier.mark(1, false), Ok(false));
        assert_eq!(
            barrier.mark(1, false),
            Err(MemoryError::Connection { connection: 1 }),
            "ahead of the others"
        );
        assert_eq!(barrier.mark(0, false), Ok(false));
        barrier.take(pass, PAGE).unwrap();
        let early = MemoryError::Pass { found: pass + 1, now: pass };
        assert_eq!(barrier.take(pass + 1, PAGE), Err(early), "memory on a connection that is ahead");
        assert_eq!(barrier.mark(2, false), Ok(true));
        barrier.take(pass + 1, PAGE).unwrap();
        assert!(barrier.take(pass, PAGE).is_err(), "an old page");
    }
    assert!(barrier.mark(3, false).is_err());
}

#[test]
fn connections_agree_on_which_pass_is_the_last() {
    let mut barrier = Barrier::new(2, PAGE);
    assert_eq!(barrier.mark(0, true), Ok(false));
    assert_eq!(barrier.mark(1, false), Err(MemoryError::Last { connection: 1 }));
    assert_eq!(barrier.mark(1, true), Ok(true));
}

#[test]
fn all_connections_together_send_no_more_than_the_guest_has() {
    let mut barrier = Barrier::new(2, 4 * PAGE);
    barrier.take(0, 3 * PAGE).unwrap();
    barrier.take(0, PAGE).unwrap();
    assert_eq!(barrier.take(0, PAGE), Err(MemoryError::Excess { pass: 0 }));
    assert_eq!((barrier.mark(0, false), barrier.mark(1, false)), (Ok(false), Ok(true)));
    barrier.take(1, 4 * PAGE).unwrap();
}

#[test]
fn checksums_follow_each_frame_of_memory_where_that_was_agreed_on() {
    let layout = layout();
    let bulk = Bulk::memory(range(PAGE, 2 * PAGE), 0, 0).unwrap();
    let sums = |range, pass| Sums { range, pass, sums: vec![0; 2] };
    let right = sums(bulk.range(), 0);
    let stray = MemoryError::Sums { gpa: PAGE };

    let mut intake = Intake::new(&layout);
    intake.bulk(&bulk).unwrap();
    assert_eq!(intake.sums(&right), Err(stray), "nobody agreed on them");

    let mut intake = Intake::new(&layout).with_page_sums(true);
    assert_eq!(intake.sums(&right), Err(stray), "of nothing");
    intake.bulk(&bulk).unwrap();
    let owed = Err(MemoryError::Unsummed { gpa: PAGE, length: 2 * PAGE });
    assert_eq!(intake.bulk(&bulk), owed);
    assert_eq!(intake.zero(Zero { range: range(0, PAGE), pass: 0 }), owed);
    assert_eq!(intake.mark(Mark { pass: 0, last: true, bytes: 2 * PAGE }), owed);
    assert_eq!(intake.sums(&sums(bulk.range(), 1)), Err(MemoryError::Pass { found: 1, now: 0 }));
    intake.sums(&right).unwrap();
    assert_eq!(intake.sums(&right), Err(stray), "twice");
    // A compressed one has its own.
    intake.bulk(&Bulk::packed(range(0, PAGE), 0, 1, 9).unwrap()).unwrap();
    intake.mark(Mark { pass: 0, last: false, bytes: 3 * PAGE }).unwrap();
    intake.bulk(&Bulk::memory(range(PAGE, 2 * PAGE), 1, 0).unwrap()).unwrap();
    assert_eq!(intake.sums(&sums(range(2 * PAGE, 2 * PAGE), 1)), Err(MemoryError::Sums { gpa: 2 * PAGE }));

    assert!(Features::PAGE_SUMS.sums_pages());
    assert!(!Features::PAGE_SUMS.and(Features::UNCHECKED_MEMORY).sums_pages());
}

#[test]
fn checksums_are_as_many_as_pages_and_tell_which_are_wrong() {
    let sums = Sums { range: range(4 * PAGE, 5 * PAGE), pass: 3, sums: vec![1, 2, 3, 4, 5] };
    let frame = Message::Sums(sums.clone()).encode().unwrap();
    assert_eq!(Message::decode(frame.clone()).unwrap(), Message::Sums(sums.clone()));
    let mut payload = frame.into_payload();
    payload.extend([0; 4]);
    let more = Frame::new(Command::Sums, payload.clone()).unwrap();
    assert!(Message::decode(more).unwrap_err().to_string().contains("number of checksums"));
    payload.truncate(20 + 4 * 5 - 1);
    assert!(Message::decode(Frame::new(Command::Sums, payload).unwrap()).is_err());

    assert!(sums.damaged(&[1, 2, 3, 4, 5]).is_empty());
    let damaged = sums.damaged(&[9, 9, 3, 9]);
    assert_eq!(damaged, [range(4 * PAGE, 2 * PAGE), range(7 * PAGE, 2 * PAGE)]);
}

proptest! {
    #[test]
    fn chunks_are_the_range(page in 0_u64..2000, pages in 1_u64..3000) {
        let whole = range(page * PAGE, pages * PAGE);
        let mut at = whole.gpa();
        for chunk in whole.chunks() {
            prop_assert_eq!(chunk.gpa(), at);
            prop_assert!(chunk.length() <= CHUNK && whole.contains(&chunk));
            prop_assert_eq!(chunk.gpa() / CHUNK, (chunk.end() - 1) / CHUNK, "one chunk's place");
            at = chunk.end();
        }
        prop_assert_eq!(at, whole.end());
    }

    #[test]
    fn what_is_answered_fits(asked in 1_u16..=128, possible: u16, bits: [bool; 4]) {
        let all = [Features::LZ4, Features::ZSTD, Features::UNCHECKED_MEMORY, Features::LOCAL_MEMORY];
        let offer = Offer { features: all.into_iter().fold(Features::NONE, Features::and), ..offer() };
        let features = all.into_iter().zip(bits).filter(|(_, on)| *on).fold(Features::NONE, |sum, (one, _)| sum.and(one));
        let hello = Hello { connections: asked, features, session: SESSION, ..hello() };
        let accept = Offer { connections: possible, ..offer }.answer(&hello).unwrap();
        prop_assert!(accept.fits(&hello));
    }

    #[test]
    fn no_range_overflows(gpa: u64, length: u64) {
        if let Ok(range) = MemoryRange::new(gpa, length) {
            prop_assert!(range.end() > range.gpa());
        }
    }
}
