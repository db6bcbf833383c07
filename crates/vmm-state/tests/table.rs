//! Every cell against a table written by hand, and the page against the generator.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "test code")]

use std::path::Path;
use vmm_state::{
    ACTIONS, Action, Admission, EventCell, GUEST_EVENTS, Phase, Reaction, Reason, admit, lifecycle_markdown,
    on_guest_event,
};

/// E, C, B, R, P, V (saving), M, A (receiving), S: the phase after success, then after failure. `ok`: nothing to do. Else the reason.
const GOLDEN: &str = "
                          Empty     Created   Booting   Running   Paused    Saving    Migrating Receiving Shutdown
vmm.ping                  EE        CC        BB        RR        PP        VV        MM        AA        SS
vmm.shutdown              EE        EE        EE        EE        EE        EE        EE        EE        EE
vmm.openapi               EE        CC        BB        RR        PP        VV        MM        AA        SS
vmm.metrics               EE        CC        BB        RR        PP        VV        MM        AA        SS
vmm.events                EE        CC        BB        RR        PP        VV        MM        AA        SS
vmm.log-level             EE        CC        BB        RR        PP        VV        MM        AA        SS
vm.create                 CE        exists    exists    exists    exists    exists    exists    moves     exists
vm.validate               EE        CC        BB        RR        PP        VV        MM        AA        SS
vm.boot                   novm      RC        wait      isrunning RP        wait      moves     moves     RS
vm.info                   novm      CC        BB        RR        PP        VV        MM        novm      SS
vm.counters               novm      notbooted wait      RR        PP        VV        MM        novm      notbooted
vm.boot-trace             novm      notbooted wait      RR        PP        VV        MM        novm      notbooted
vm.shutdown               novm      notbooted wait      SS        SS        wait      moves     moves     notbooted
vm.reboot                 novm      notbooted wait      RS        RS        wait      moves     moves     notbooted
vm.delete                 ok        EE        EE        EE        EE        wait      moves     moves     EE
vm.pause                  novm      notbooted wait      PR        ispaused  wait      moves     moves     notbooted
vm.resume                 novm      notbooted wait      isrunning RP        wait      moves     moves     notbooted
vm.snapshot               novm      notbooted wait      RR        PP        wait      moves     moves     notbooted
vm.restore                PE        exists    exists    exists    exists    exists    exists    moves     exists
vm.cancel                 novm      nojob     CC        nojob     nojob     PP        RM        EA        nojob
vm.power-button           novm      notbooted wait      RR        PP        wait      moves     moves     notbooted
vm.nmi                    novm      notbooted wait      RR        PP        wait      moves     moves     notbooted
vm.add-device             novm      CC        wait      later     later     later     moves     moves     SS
vm.add-user-device        novm      CC        wait      later     later     later     moves     moves     SS
vm.add-disk               novm      CC        wait      later     later     later     moves     moves     SS
vm.add-fs                 novm      CC        wait      later     later     later     moves     moves     SS
vm.add-generic-vhost-user novm      CC        wait      later     later     later     moves     moves     SS
vm.add-pmem               novm      CC        wait      later     later     later     moves     moves     SS
vm.add-net                novm      CC        wait      later     later     later     moves     moves     SS
vm.add-vdpa               novm      CC        wait      later     later     later     moves     moves     SS
vm.add-vsock              novm      CC        wait      later     later     later     moves     moves     SS
vm.remove-device          novm      CC        wait      later     later     later     moves     moves     SS
vm.resize                 novm      later     later     later     later     later     later     later     later
vm.resize-disk            novm      later     later     later     later     later     later     later     later
vm.resize-zone            novm      later     later     later     later     later     later     later     later
vm.coredump               novm      notbooted later     later     later     later     later     later     notbooted
vm.receive-migration      RE        exists    exists    exists    exists    exists    exists    moves     exists
vm.send-migration         novm      notbooted wait      ER        EP        wait      moves     moves     notbooted
vm.migration-progress     EE        CC        BB        RR        PP        VV        MM        AA        SS
vm.migration-keep         novm      stays     stays     stays     stays     stays     RM        stays     stays
vm.migration-yield        novm      stays     stays     stays     stays     stays     EM        stays     stays
";

const GOLDEN_EVENTS: &str = "
               Empty     Created   Booting   Running   Paused    Saving    Migrating Receiving Shutdown
reset          ignore    ignore    ignore    react     defer     defer     defer     ignore    ignore
triple-fault   ignore    ignore    ignore    react     defer     defer     defer     ignore    ignore
shutdown       ignore    ignore    ignore    react     defer     defer     defer     ignore    ignore
panic          ignore    ignore    ignore    react     defer     defer     defer     ignore    ignore
crash          ignore    ignore    ignore    react     defer     defer     defer     ignore    ignore
";

/// The default first; then where each leads: after success, after failure.
const GOLDEN_REACTIONS: &str = "
               choices
reset          restart:RS stop:SS exit:EE
triple-fault   restart:RS stop:SS exit:EE
shutdown       exit:EE stop:SS
panic          report:RR pause:PR restart:RS stop:SS exit:EE
crash          exit:EE stop:SS
";

fn letter(phase: Phase) -> char {
    match phase {
        Phase::Saving => 'V',
        Phase::Receiving => 'A',
        other => other.name().chars().next().unwrap(),
    }
}

fn action_cell(phase: Phase, action: Action) -> String {
    match admit(phase, action) {
        Admission::Run(step) => [letter(step.done), letter(step.failed)].iter().collect(),
        Admission::Nothing => "ok".to_owned(),
        Admission::Wait => "wait".to_owned(),
        Admission::Refused(refusal) => {
            assert_eq!((refusal.action, refusal.phase), (action, phase));
            assert!(!refusal.allowed.contains(phase));
            match refusal.reason {
                Reason::NoVm => "novm",
                Reason::AlreadyCreated => "exists",
                Reason::NotBooted => "notbooted",
                Reason::AlreadyRunning => "isrunning",
                Reason::AlreadyPaused => "ispaused",
                Reason::NotPaused => "notpaused",
                Reason::NoJob => "nojob",
                Reason::Migrating => "moves",
                Reason::NotMigrating => "stays",
                Reason::NotBuilt => "later",
            }
            .to_owned()
        }
    }
}

fn event_cell(phase: Phase, event: vmm_state::GuestEvent) -> String {
    match on_guest_event(phase, event) {
        EventCell::React => "react".to_owned(),
        EventCell::Defer => "defer".to_owned(),
        EventCell::Ignore => "ignore".to_owned(),
    }
}

fn words(text: &str) -> Vec<Vec<String>> {
    let rows = text.lines().filter(|line| !line.trim().is_empty()).skip(1);
    rows.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

/// A line of a golden table.
fn line(name: &str, cells: impl Iterator<Item = String>) -> Vec<String> {
    [name.to_owned()].into_iter().chain(cells).collect()
}

/// The line of `name`, whose cells are what `cell` says of each phase.
fn line_of_phases(name: &str, cell: impl Fn(Phase) -> String) -> Vec<String> {
    line(name, Phase::ALL.iter().map(|phase| cell(*phase)))
}

#[test]
fn every_action_in_every_phase() {
    let ours = ACTIONS.iter().map(|row| line_of_phases(row.name, |phase| action_cell(phase, row.action)));
    assert_eq!(ours.collect::<Vec<_>>(), words(GOLDEN));
}

#[test]
fn every_guest_event_in_every_phase() {
    let ours = GUEST_EVENTS.iter().map(|row| line_of_phases(row.name, |phase| event_cell(phase, row.event)));
    assert_eq!(ours.collect::<Vec<_>>(), words(GOLDEN_EVENTS));
}

#[test]
fn every_reaction_to_every_guest_event() {
    let choice = |reaction: &Reaction| {
        let step = reaction.step();
        format!("{reaction}:{}{}", letter(step.done), letter(step.failed))
    };
    let ours = GUEST_EVENTS.iter().map(|row| line(row.name, row.reactions.iter().map(choice)));
    assert_eq!(ours.collect::<Vec<_>>(), words(GOLDEN_REACTIONS));
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
