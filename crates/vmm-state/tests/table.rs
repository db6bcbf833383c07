//! Every cell against a table written by hand, and the page against the generator.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "test code")]

use std::path::Path;
use vmm_state::{
    ACTIONS, Action, Admission, EventCell, GUEST_EVENTS, Phase, Reason, admit, lifecycle_markdown,
    on_guest_event,
};

/// E, C, R, P, S: the phase after success, then after failure. `ok`: nothing to do. Else the reason.
const GOLDEN: &str = "
               Empty  Created    Running    Paused   Shutdown
vmm.ping       EE     CC         RR         PP       SS
vmm.shutdown   EE     EE         EE         EE       EE
vm.create      CE     exists     exists     exists   exists
vm.boot        novm   RC         isrunning  RP       RS
vm.info        novm   CC         RR         PP       SS
vm.shutdown    novm   notbooted  SS         SS       notbooted
vm.reboot      novm   notbooted  RS         RS       notbooted
vm.delete      ok     EE         EE         EE       EE
vm.pause       novm   notbooted  PR         ispaused notbooted
vm.resume      novm   notbooted  isrunning  RP       notbooted
";

const GOLDEN_EVENTS: &str = "
                     Empty   Created  Running  Paused  Shutdown
guest-reset          ignore  ignore   RS       defer   ignore
guest-triple-fault   ignore  ignore   RS       defer   ignore
guest-shutdown       ignore  ignore   SS       defer   ignore
guest-crash          ignore  ignore   SS       defer   ignore
";

fn letter(phase: Phase) -> char {
    phase.name().chars().next().unwrap()
}

fn action_cell(phase: Phase, action: Action) -> String {
    match admit(phase, action) {
        Admission::Run(step) => [letter(step.done), letter(step.failed)].iter().collect(),
        Admission::Nothing => "ok".to_owned(),
        Admission::Refused(refusal) => {
            assert_eq!((refusal.action, refusal.phase), (action, phase));
            assert!(!refusal.allowed.contains(phase));
            match refusal.reason {
                Reason::NoVm => "novm",
                Reason::AlreadyCreated => "exists",
                Reason::NotBooted => "notbooted",
                Reason::AlreadyRunning => "isrunning",
                Reason::AlreadyPaused => "ispaused",
            }
            .to_owned()
        }
    }
}

fn event_cell(phase: Phase, event: vmm_state::GuestEvent) -> String {
    match on_guest_event(phase, event) {
        EventCell::Run(step) => [letter(step.done), letter(step.failed)].iter().collect(),
        EventCell::Defer => "defer".to_owned(),
        EventCell::Ignore => "ignore".to_owned(),
    }
}

fn words(text: &str) -> Vec<Vec<String>> {
    let rows = text.lines().filter(|line| !line.trim().is_empty()).skip(1);
    rows.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

#[test]
fn every_action_in_every_phase() {
    let mut ours = Vec::new();
    for row in &ACTIONS {
        let cells = Phase::ALL.iter().map(|phase| action_cell(*phase, row.action));
        ours.push([row.name.to_owned()].into_iter().chain(cells).collect::<Vec<_>>());
    }
    assert_eq!(ours, words(GOLDEN));
}

#[test]
fn every_guest_event_in_every_phase() {
    let mut ours = Vec::new();
    for row in &GUEST_EVENTS {
        let cells = Phase::ALL.iter().map(|phase| event_cell(*phase, row.event));
        ours.push([row.name.replace(' ', "-")].into_iter().chain(cells).collect::<Vec<_>>());
    }
    assert_eq!(ours, words(GOLDEN_EVENTS));
}

#[test]
fn the_page_is_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/lifecycle.md");
    let page = lifecycle_markdown();
    if std::env::var_os("VMM_BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed =
        std::fs::read_to_string(&path).expect("docs/lifecycle.md is missing: run with VMM_BLESS=1");
    assert_eq!(committed, page, "run with VMM_BLESS=1 and look at the difference");
}
