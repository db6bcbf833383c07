//! Tells what the KVM of this machine can run: `cargo run -p vmm-tests --example hostkvm`.

use vmm_tests::hostkvm::KvmAbility;

fn main() {
    println!("{:?}", KvmAbility::probe());
}
