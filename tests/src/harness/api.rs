//! The API of a VMM under test.

use std::path::Path;

use serde_json::Value;
use vmm_api::client::Client;
use vmm_api::command::Method;
use vmm_api::commands::vm;
use vmm_api::info::VmInfo;
use vmm_state::Phase;

use super::{LIMIT, wait_until};

/// A connection.
#[derive(Debug)]
pub struct Api {
    client: Client,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body as text.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }
}

impl Api {
    /// Connects to the socket at `path`.
    ///
    /// # Panics
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Self {
        let mut client = Client::connect(path).expect("the API socket takes a connection");
        client.set_timeout(Some(LIMIT)).expect("a time limit");
        Self { client }
    }

    /// Gives each request up to `limit`.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn patient(&mut self, limit: std::time::Duration) {
        self.client.set_timeout(Some(limit)).expect("a time limit");
    }

    /// A GET request.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn get(&mut self, name: &str) -> Answer {
        self.request(Method::Get, name, b"")
    }

    /// A PUT request without a body.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn put(&mut self, name: &str) -> Answer {
        self.request(Method::Put, name, b"")
    }

    /// A request as it is.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn request(&mut self, method: Method, name: &str, body: &[u8]) -> Answer {
        let answer = self.client.request(method, name, body, &[]);
        let answer = answer.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        Answer { status: answer.status, body: String::from_utf8_lossy(&answer.body).into_owned() }
    }

    /// PUT requests without a body that succeed.
    ///
    /// # Panics
    /// When one does not.
    pub fn puts(&mut self, names: &[&str]) {
        for name in names {
            let answer = self.put(name);
            assert!((200..300).contains(&answer.status), "{name}: {answer:?}");
        }
    }

    /// `vm.create` that succeeds.
    ///
    /// # Panics
    /// When it does not.
    pub fn create(&mut self, config: &Value) {
        let answer = self.try_create(config);
        assert_eq!(answer.status, 204, "vm.create: {answer:?}");
    }

    /// `vm.create`.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn try_create(&mut self, config: &Value) -> Answer {
        self.request(Method::Put, "vm.create", config.to_string().as_bytes())
    }

    /// A PUT request with a JSON body.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn put_json(&mut self, name: &str, body: &Value) -> Answer {
        self.request(Method::Put, name, body.to_string().as_bytes())
    }

    /// The same, which succeeds.
    ///
    /// # Panics
    /// When it does not.
    pub fn done(&mut self, name: &str, body: &Value) {
        let answer = self.put_json(name, body);
        assert_eq!(answer.status, 204, "{name}: {answer:?}");
    }

    /// `vm.info`, by the typed client.
    ///
    /// # Panics
    /// When there is none.
    pub fn info(&mut self) -> VmInfo {
        self.client.call::<vm::Info>(&()).expect("vm.info")
    }

    /// The VM's phase by `vm.info`, which has none to tell of in some.
    ///
    /// # Panics
    /// When there is no answer, or the contract's word is not the phase's.
    pub fn phase(&mut self) -> Phase {
        let answer = self.get("vm.info");
        let info = answer.json();
        let word = info.get("phase").and_then(Value::as_str).unwrap_or_default();
        let phase = Phase::ALL.into_iter().find(|phase| phase.name() == word);
        if answer.status == 404 {
            return phase.expect("a refusal says the phase");
        }
        let phase = phase.unwrap_or_else(|| panic!("{word:?} is no phase"));
        let state = info.get("state").and_then(Value::as_str);
        // A VM that is saved or given away may run on.
        let lives = [Phase::Saving, Phase::Migrating].contains(&phase) && state == Some("Running");
        assert!(lives || state == phase.contract_word(), "{phase}: {state:?}");
        phase
    }

    /// Waits until the VM is in `phase`.
    ///
    /// # Panics
    /// When that takes longer than [`LIMIT`].
    pub fn wait_for(&mut self, phase: Phase) {
        wait_until(LIMIT, || (self.phase() == phase).then_some(()), || format!("the phase {phase}"));
    }

    /// The word of `vm.info` for the VM's state.
    ///
    /// # Panics
    /// When there is no VM.
    pub fn state(&mut self) -> String {
        let answer = self.get("vm.info");
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json().get("state").and_then(Value::as_str).unwrap_or_default().to_owned()
    }
}
