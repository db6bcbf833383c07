//! The policy of passes: what it promises for any guest and any link.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::time::Duration;

use proptest::prelude::*;
use vmm_migration_protocol::{Decision, Goals, Pass, Policy, Stop, TimeoutStrategy};

const MIB: u64 = 1 << 20;

fn milliseconds(number: u64) -> Duration {
    Duration::from_millis(number)
}

fn goals() -> Goals {
    Goals { overhead: Duration::ZERO, ..Goals::default() }
}

/// A guest that writes to `rate` bytes a second of `memory` bytes, on a link of `bandwidth` bytes a second: what is
/// decided after each pass, up to the end.
fn simulate(goals: Goals, memory: u64, rate: u64, bandwidth: u64) -> Vec<Decision> {
    simulate_packed(goals, memory, rate, (bandwidth, 1))
}

/// The same where the link carries a `packs`th of the bytes.
fn simulate_packed(goals: Goals, memory: u64, rate: u64, (bandwidth, packs): (u64, u64)) -> Vec<Decision> {
    let mut policy = Policy::new(goals);
    let (mut elapsed, mut moved, mut throttle) = (Duration::ZERO, memory, 0_u8);
    let mut decisions = Vec::new();
    for _ in 0..10_000 {
        let sent = moved / packs;
        let took = Duration::from_secs_f64(sent as f64 / bandwidth as f64) + milliseconds(1);
        elapsed += took;
        let slowed = rate as f64 * f64::from(100 - throttle) / 100.0;
        let dirty = ((slowed * took.as_secs_f64()) as u64).min(memory);
        let decision = policy.decide(Pass { sent, memory: moved, took, dirty }, elapsed);
        decisions.push(decision);
        match decision {
            Decision::Again { throttle: next } => (throttle, moved) = (next, dirty),
            Decision::Finish(_) | Decision::GiveUp(_) => return decisions,
        }
    }
    panic!("no end");
}

#[test]
fn a_quiet_guest_is_moved_after_one_pass() {
    assert_eq!(simulate(goals(), 512 * MIB, 0, 1000 * MIB), [Decision::Finish(Stop::Converged)]);
}

#[test]
fn what_the_link_carries_in_fewer_bytes_fits_sooner() {
    // 150 ms for a quarter of 60 MiB, which the guest writes to all the time.
    let goals = Goals { auto_converge: true, ..goals() };
    let decisions = simulate_packed(goals, 60 * MIB, 6000 * MIB, (100 * MIB, 4));
    assert_eq!(decisions, [Decision::Finish(Stop::Converged)]);
    // As they are, they would take 600 ms.
    assert!(simulate(goals, 60 * MIB, 6000 * MIB, 100 * MIB).len() > 10);
}

/// What the guest leaves behind is not what it left before: zeros and a link that stalls.
#[test]
fn one_pass_that_is_unlike_the_others_says_little_of_what_is_left() {
    let second = Duration::from_secs(1);
    let pass = |sent, memory, dirty| Pass { sent, memory, took: second, dirty };
    let usual = pass(1000 * MIB, 1000 * MIB, 1000 * MIB);
    let after = |unusual: Pass| {
        let mut policy = Policy::new(goals());
        policy.decide(usual, second);
        policy.decide(Pass { dirty: 1000 * MIB, ..unusual }, second);
        policy.blackout().unwrap()
    };
    assert!(after(pass(100 << 10, 100_000 * MIB, 0)) >= milliseconds(500), "all zero");
    assert!(after(pass(10 * MIB, 10 * MIB, 0)) <= milliseconds(2000), "a hundredth of the speed");
    let mut policy = Policy::new(goals());
    for _ in 0..20 {
        policy.decide(pass(100 << 10, 7000 * MIB, 7000 * MIB), second);
    }
    assert!(policy.blackout().unwrap() >= second, "zeros have to be looked at");
}

#[test]
fn passes_get_shorter_until_the_rest_fits() {
    let decisions = simulate(goals(), 4096 * MIB, 300 * MIB, 1000 * MIB);
    // 1.2 GiB, 370 MiB, 110 MiB are left: 110 ms fit, 370 ms do not.
    assert_eq!(decisions.last(), Some(&Decision::Finish(Stop::Converged)));
    assert_eq!(decisions.len(), 3);
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_slowed_down_in_steps() {
    let goals = Goals { auto_converge: true, ..goals() };
    let decisions = simulate(goals, 4096 * MIB, 3000 * MIB, 1000 * MIB);
    let mut steps: Vec<u8> = decisions
        .iter()
        .filter_map(
            |decision| if let Decision::Again { throttle } = decision { Some(*throttle) } else { None },
        )
        .collect();
    steps.dedup();
    // At 70 a pass would be a tenth shorter than the one before, which is too little.
    assert_eq!(steps, [0, 20, 30, 40, 50, 60, 70, 80]);
    assert_eq!(decisions.last(), Some(&Decision::Finish(Stop::Converged)));
}

#[test]
fn without_slowing_down_time_decides() {
    let run = |strategy| {
        let goals = Goals { strategy, timeout: Duration::from_secs(60), ..goals() };
        *simulate(goals, 4096 * MIB, 3000 * MIB, 1000 * MIB).last().unwrap()
    };
    assert_eq!(run(TimeoutStrategy::Cancel), Decision::GiveUp(Stop::Timeout));
    assert_eq!(run(TimeoutStrategy::Ignore), Decision::Finish(Stop::Timeout));
    let few = Goals { passes: 4, ..goals() };
    let decisions = simulate(few, 4096 * MIB, 3000 * MIB, 1000 * MIB);
    assert_eq!((decisions.len(), decisions.last()), (4, Some(&Decision::GiveUp(Stop::Passes))));
}

#[test]
fn the_overhead_is_taken_off_but_never_more_than_half() {
    let decide = |downtime, overhead, dirty| {
        let goals = Goals { downtime: milliseconds(downtime), overhead: milliseconds(overhead), ..goals() };
        let mut policy = Policy::new(goals);
        policy.decide(
            Pass { sent: 1000 * MIB, memory: 1000 * MIB, took: Duration::from_secs(1), dirty: dirty * MIB },
            Duration::from_secs(1),
        )
    };
    let finish = Decision::Finish(Stop::Converged);
    assert_eq!(decide(100, 20, 80), finish);
    assert_ne!(decide(100, 20, 81), finish);
    assert_eq!(decide(2, 20, 1), finish);
    assert_ne!(decide(2, 20, 2), finish);
}

#[test]
fn estimates_follow_the_passes() {
    let mut policy = Policy::new(goals());
    assert_eq!((policy.bandwidth(), policy.dirty_rate(), policy.blackout()), (0, 0, None));
    let second = Duration::from_secs(1);
    policy.decide(Pass { sent: 1000 * MIB, memory: 1000 * MIB, took: second, dirty: 500 * MIB }, second);
    assert_eq!((policy.bandwidth(), policy.dirty_rate()), (1000 * MIB, 500 * MIB));
    assert_eq!(policy.blackout(), Some(milliseconds(500)));
    policy.decide(Pass { sent: 500 * MIB, memory: 500 * MIB, took: second, dirty: 750 * MIB }, second);
    assert_eq!((policy.bandwidth(), policy.blackout()), (750 * MIB, Some(second)));
    // Next to nothing in a long time is the latency of a pass.
    policy.decide(Pass { sent: 4096, memory: 4096, took: second, dirty: 750 * MIB }, second);
    assert_eq!(policy.bandwidth(), 750 * MIB);
}

fn pass() -> impl Strategy<Value = Pass> {
    let sizes = prop_oneof![Just(0), 0..1000 * MIB, any::<u64>()];
    let times = prop_oneof![Just(0), 0..10_000_000_000_u64, any::<u64>()];
    (sizes.clone(), sizes.clone(), times, sizes).prop_map(|(sent, memory, took, dirty)| Pass {
        sent,
        memory,
        took: Duration::from_nanos(took),
        dirty,
    })
}

proptest! {
    #[test]
    fn any_passes_are_answered(
        passes in prop::collection::vec((pass(), 0_u64..7200), 1..60),
        ignore: bool,
        auto_converge: bool,
        most in 1_u32..100,
    ) {
        let strategy = if ignore { TimeoutStrategy::Ignore } else { TimeoutStrategy::Cancel };
        let goals = Goals { strategy, auto_converge, passes: most, ..goals() };
        let mut policy = Policy::new(goals);
        let mut slowed = 0;
        for (index, (pass, elapsed)) in passes.into_iter().enumerate() {
            let elapsed = Duration::from_secs(elapsed);
            let over = elapsed >= goals.timeout || index as u32 + 1 >= most;
            match policy.decide(pass, elapsed) {
                Decision::Again { throttle } => {
                    prop_assert!(!over, "goes on after the end");
                    prop_assert!(throttle >= slowed && throttle <= 99 && (auto_converge || throttle == 0));
                    prop_assert!(policy.blackout().is_none_or(|blackout| blackout > goals.downtime));
                    slowed = throttle;
                }
                Decision::Finish(Stop::Converged) => {
                    prop_assert!(policy.blackout().is_none_or(|blackout| blackout <= goals.downtime));
                    prop_assert!(policy.blackout().is_some() || pass.dirty == 0);
                }
                Decision::Finish(_) => prop_assert!(over && ignore),
                Decision::GiveUp(_) => prop_assert!(over && !ignore),
            }
        }
    }

    #[test]
    fn every_guest_is_decided_about(memory in 1_u64..8192, rate in 0_u64..5000, bandwidth in 1_u64..5000, auto_converge: bool) {
        let goals = Goals { auto_converge, timeout: Duration::from_secs(600), ..goals() };
        let decisions = simulate(goals, memory * MIB, rate * MIB, bandwidth * MIB);
        let last = *decisions.last().unwrap();
        if rate * 2 < bandwidth {
            prop_assert!(matches!(last, Decision::Finish(Stop::Converged) | Decision::GiveUp(Stop::Timeout)));
        }
        let open = matches!(last, Decision::Again { .. });
        prop_assert!(!open, "no decision");
    }
}
