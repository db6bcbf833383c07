//! Walks a VM through its life and prints what each request is answered.

use vmm_state::{Action, Admission, VmSlot, admit};

fn main() {
    let mut slot: VmSlot<&str, &str> = VmSlot::Empty;
    for action in [Action::Boot, Action::Create, Action::Boot, Action::Create, Action::Pause, Action::Delete]
    {
        let phase = slot.phase();
        match admit(phase, action) {
            Admission::Run(step) => println!("{phase:>8}: {} -> {}", action.name(), step.done),
            Admission::Nothing => println!("{phase:>8}: {} has nothing to do", action.name()),
            Admission::Wait => println!("{phase:>8}: {} waits for the boot", action.name()),
            Admission::Refused(refusal) => println!("{phase:>8}: {refusal} (allowed in {})", refusal.allowed),
        }
        // The owner of the VM does the work, then moves the slot; here nothing can fail. Refused moves change nothing.
        let _ = match action {
            Action::Create => slot.create("config").is_ok(),
            Action::Boot => slot.begin_boot().is_ok() && slot.start("machine").is_ok(),
            Action::Pause => slot.pause().is_ok(),
            _ => slot.clear().0.is_some(),
        };
    }
}
