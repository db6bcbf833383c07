//! Random histories keep slot and table together.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use proptest::prelude::*;
use vmm_state::{
    ACTIONS, Action, Admission, EventCell, GUEST_EVENTS, Guest, Phase, Reaction, VmSlot, admit,
    on_guest_event,
};

type Slot = VmSlot<u32, u32>;

/// What an owner does for an admitted action; `fails` makes the work fail.
fn perform(slot: &mut Slot, action: Action, fails: bool, serial: u32) {
    match action {
        Action::VmmShutdown | Action::Delete => {
            slot.clear();
        }
        Action::Create if !fails => slot.create(serial).unwrap(),
        Action::Boot if !fails && slot.phase() == Phase::Paused => slot.resume().unwrap(),
        Action::Boot if slot.phase() != Phase::Paused => boot(slot, fails, serial),
        Action::Resume if !fails => slot.resume().unwrap(),
        Action::Pause if !fails => slot.pause().unwrap(),
        Action::Shutdown => assert!(slot.stop().is_some()),
        Action::Reboot => reboot(slot, fails, serial),
        Action::Snapshot => save(slot),
        Action::Restore => restore(slot, fails, serial),
        Action::ReceiveMigration => receive(slot, fails, serial),
        Action::SendMigration => send(slot, fails),
        // They failed, ask, or edit the configuration in place.
        _ => {}
    }
}

fn boot(slot: &mut Slot, fails: bool, serial: u32) {
    slot.begin_boot().unwrap();
    if fails { slot.fail_boot().unwrap() } else { slot.start(serial).unwrap() }
}

/// It ends where it began, however it ends.
fn save(slot: &mut Slot) {
    let guest = if slot.phase() == Phase::Running { Guest::Runs } else { Guest::Rests };
    slot.begin_save().unwrap();
    assert_eq!((slot.phase(), slot.machine().is_some()), (Phase::Saving, true));
    slot.end_save(guest).unwrap();
}

/// It ends where it began, or elsewhere.
fn send(slot: &mut Slot, fails: bool) {
    let guest = if slot.phase() == Phase::Running { Guest::Runs } else { Guest::Rests };
    slot.begin_migrate().unwrap();
    assert_eq!((slot.phase(), slot.machine().is_some()), (Phase::Migrating, true));
    if fails {
        slot.end_migrate(guest).unwrap();
    } else {
        slot.clear();
    }
}

/// What arrived may go again before the end.
fn receive(slot: &mut Slot, fails: bool, serial: u32) {
    slot.begin_receive().unwrap();
    slot.load(serial).unwrap();
    assert_eq!((slot.phase(), slot.machine().is_some()), (Phase::Receiving, false));
    if fails {
        slot.fail_boot().unwrap();
        slot.end_receive().unwrap();
    } else {
        slot.restored(serial).unwrap();
        slot.resume().unwrap();
    }
}

fn restore(slot: &mut Slot, fails: bool, serial: u32) {
    slot.begin_restore().unwrap();
    slot.load(serial).unwrap();
    if fails { slot.fail_boot().unwrap() } else { slot.restored(serial).unwrap() }
}

fn reboot(slot: &mut Slot, fails: bool, serial: u32) {
    assert!(slot.stop().is_some());
    boot(slot, fails, serial);
}

/// What an owner does by an operator's choice.
fn react(slot: &mut Slot, reaction: Reaction, fails: bool, serial: u32) {
    match reaction {
        Reaction::Report => {}
        Reaction::Pause if fails => {}
        Reaction::Pause => slot.pause().unwrap(),
        Reaction::Restart => reboot(slot, fails, serial),
        Reaction::Stop => assert!(slot.stop().is_some()),
        Reaction::Exit => {
            slot.clear();
        }
    }
}

fn check(slot: &Slot) {
    let phase = slot.phase();
    assert_eq!(slot.config().is_some(), phase != Phase::Empty);
    assert_eq!(slot.machine().is_some(), matches!(phase, Phase::Running | Phase::Paused));
    assert_eq!(phase.contract_word().is_some(), phase != Phase::Empty);
}

proptest! {
    #[test]
    fn slot_and_table_agree(history in proptest::collection::vec(any::<(prop::sample::Index, prop::sample::Index, bool)>(), 0..200)) {
        let mut slot = Slot::Empty;
        for (serial, (pick, choice, fails)) in history.into_iter().enumerate() {
            let (before, serial) = (slot.phase(), u32::try_from(serial).unwrap());
            let pick = pick.index(ACTIONS.len() + GUEST_EVENTS.len());
            let step = if let Some(row) = ACTIONS.get(pick) {
                match admit(before, row.action) {
                    Admission::Run(step) => { perform(&mut slot, row.action, fails, serial); Some(step) }
                    Admission::Wait => unreachable!("no boot or snapshot is left under way"),
                    Admission::Nothing | Admission::Refused(_) => None,
                }
            } else {
                let row = &GUEST_EVENTS[pick - ACTIONS.len()];
                match on_guest_event(before, row.event) {
                    EventCell::React => {
                        let reaction = *choice.get(row.reactions);
                        react(&mut slot, reaction, fails, serial);
                        Some(reaction.step())
                    }
                    EventCell::Defer => { prop_assert_eq!(before, Phase::Paused); None }
                    EventCell::Ignore => { prop_assert!(slot.machine().is_none()); None }
                }
            };
            let expected = step.map_or(before, |step| if fails { step.failed } else { step.done });
            prop_assert_eq!(slot.phase(), expected);
            check(&slot);
        }
    }

    /// From any phase, delete leads to Empty, and from Empty a VM can be brought up again.
    #[test]
    fn no_dead_end(history in proptest::collection::vec((0..ACTIONS.len(), any::<bool>()), 0..50)) {
        let mut slot = Slot::Empty;
        for (pick, fails) in history {
            let action = ACTIONS[pick].action;
            if let Admission::Run(_) = admit(slot.phase(), action) { perform(&mut slot, action, fails, 0); }
        }
        if let Admission::Run(step) = admit(slot.phase(), Action::Delete) {
            prop_assert_eq!(step.done, Phase::Empty);
            perform(&mut slot, Action::Delete, false, 0);
        }
        for (action, phase) in [(Action::Create, Phase::Created), (Action::Boot, Phase::Running)] {
            prop_assert!(matches!(admit(slot.phase(), action), Admission::Run(_)));
            perform(&mut slot, action, false, 0);
            prop_assert_eq!(slot.phase(), phase);
        }
    }
}
