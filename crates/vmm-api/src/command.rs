//! A command is a type; the table of commands is the API.
//!
//! [`Command`] names the request's and the reply's type, the route and the action that `vmm-state` admits. A host that
//! implements [`Handle`] for a command can put it into its table with [`Endpoint::of`]; there the types are erased,
//! once, so that there is no enum of replies. Decoding happens on the server's thread ([`Endpoint::prepare`]), admission
//! and the handler run on the host's ([`ApiRequest::dispatch`]), and the reply finds its way by a [`Replier`].

use crate::config::wire::Wire;
use crate::config::{UnknownFields, read_object};
use crate::error::{ApiError, Code};
use crate::openapi::Described;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use vmm_state::{Action, Admission, Phase, Reason, admit};

/// The HTTP methods of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Asks.
    Get,
    /// Acts.
    Put,
}

impl Method {
    /// The method's token.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

/// One command of the API. The type itself is only a name.
pub trait Command: 'static {
    /// What the client sends.
    type Request: Encode + Decode + Described + Send + 'static;
    /// What it gets.
    type Reply: Encode + Decode + Described + Send + 'static;
    /// The route below `/api/v1/`, such as `vm.create`.
    const NAME: &'static str;
    /// The method.
    const METHOD: Method;
    /// What `vmm-state` is asked.
    const ACTION: Action;
    /// One sentence for help and documents.
    const DOC: &'static str;
    /// What it can fail with, beside what any request can, what is wrong with the payload, and the phase.
    const FAILURES: &'static [Code] = &[];
}

/// A request's payload: its body and the descriptors that came with it.
#[derive(Debug, Default)]
pub struct Incoming {
    /// The body; empty if there was none.
    pub body: Vec<u8>,
    /// The descriptors. Those a command does not take are closed.
    pub fds: Vec<OwnedFd>,
    /// What happens to fields nobody knows, in configurations.
    pub unknown_fields: UnknownFields,
}

/// Reads a payload. Checks everything that can be decided from the bytes.
pub trait Decode: Sized {
    /// The value of `incoming`.
    ///
    /// # Errors
    /// The payload is not what this type looks like on the wire.
    fn decode(incoming: Incoming) -> Result<Self, ApiError>;
}

/// Writes a payload.
pub trait Encode {
    /// The media type of the body, if there is one.
    const MEDIA_TYPE: &'static str;

    /// The body; empty for none.
    ///
    /// # Errors
    /// The value has no JSON form.
    fn encode(&self) -> Result<Vec<u8>, ApiError>;
}

/// No body is written, and one that is there is not looked at: some clients send `null` or `{}`.
impl Decode for () {
    fn decode(_incoming: Incoming) -> Result<Self, ApiError> {
        Ok(())
    }
}

impl Encode for () {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        Ok(Vec::new())
    }
}

/// The objects of the contract are read by their tables, with all faults at once.
impl<T: Wire> Decode for T {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        Ok(read_object(&incoming.body, incoming.unknown_fields)?)
    }
}

impl<T: Wire> Encode for T {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(self)
    }
}

/// The media type of JSON.
pub const JSON: &str = "application/json";

/// Reads a JSON body, for implementing [`Decode`].
///
/// # Errors
/// The body is not JSON of `T`'s form.
pub fn decode_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        ApiError::from_error(Code::MalformedBody, &error).context("the body is not what this request takes")
    })
}

/// Writes a JSON body, for implementing [`Encode`].
///
/// # Errors
/// `value` has no JSON form.
pub fn encode_json<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(|error| ApiError::from_error(Code::Internal, &error))
}

/// Who owns the VM, as far as admission is concerned.
pub trait Host: Sized {
    /// The VM's phase now.
    fn phase(&self) -> Phase;

    /// Keeps a request that cannot be decided while a boot is under way; to be dispatched again when it has ended.
    fn park(&mut self, request: ApiRequest<Self>);

    /// Posts what has changed on the [boards](crate::http::board). Called before a handler's replies go out.
    fn publish(&mut self);
}

/// A host that can carry out `C`. It is called only in a phase that admits `C`.
pub trait Handle<C: Command> {
    /// Carries out the command. The reply may be given later, from anywhere: the client waits, the host does not.
    fn handle(&mut self, request: C::Request, replier: Replier<C::Reply>);
}

/// A row of a host's command table.
pub struct Endpoint<H: 'static> {
    name: &'static str,
    method: Method,
    action: Action,
    doc: &'static str,
    prepare: fn(Incoming) -> Result<Call<H>, ApiError>,
}

/// A decoded request, ready to be carried out.
pub type Call<H> = Box<dyn FnOnce(&mut H, ReplySlot) + Send>;

impl<H: 'static> Endpoint<H> {
    /// The row of `C`.
    #[must_use]
    pub const fn of<C: Command>() -> Self
    where
        H: Handle<C>,
    {
        Self { name: C::NAME, method: C::METHOD, action: C::ACTION, doc: C::DOC, prepare: prepare::<H, C> }
    }

    /// The row of a command whose work is not built yet: its request is read, and answered with `not_built`.
    #[must_use]
    pub const fn later<C: Command>() -> Self {
        Self { name: C::NAME, method: C::METHOD, action: C::ACTION, doc: C::DOC, prepare: later::<H, C> }
    }

    /// The route below `/api/v1/`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The method.
    #[must_use]
    pub const fn method(&self) -> Method {
        self.method
    }

    /// What `vmm-state` is asked.
    #[must_use]
    pub const fn action(&self) -> Action {
        self.action
    }

    /// One sentence about the command.
    #[must_use]
    pub const fn doc(&self) -> &'static str {
        self.doc
    }

    /// Decodes a payload, on any thread. `None` if it does not decode; the slot has been told why.
    #[must_use]
    pub fn prepare(&'static self, incoming: Incoming, slot: ReplySlot) -> Option<ApiRequest<H>> {
        match (self.prepare)(incoming) {
            Ok(call) => Some(ApiRequest { endpoint: self, call, slot }),
            Err(error) => {
                slot.send(Err(error));
                None
            }
        }
    }
}

fn prepare<H, C>(incoming: Incoming) -> Result<Call<H>, ApiError>
where
    C: Command,
    H: Handle<C> + 'static,
{
    let request = C::Request::decode(incoming)?;
    Ok(Box::new(move |host: &mut H, slot| host.handle(request, Replier::new(slot))))
}

fn later<H, C: Command>(incoming: Incoming) -> Result<Call<H>, ApiError> {
    C::Request::decode(incoming)?;
    let refused = format!("{} is not possible: {}", C::NAME, Reason::NotBuilt);
    Ok(Box::new(move |_, slot: ReplySlot| slot.send(Err(ApiError::new(Code::NotBuilt, refused)))))
}

/// A decoded request on its way to the host's thread.
pub struct ApiRequest<H: 'static> {
    endpoint: &'static Endpoint<H>,
    call: Call<H>,
    slot: ReplySlot,
}

impl<H: Host + 'static> ApiRequest<H> {
    /// Asks for admission and carries the request out, or answers the refusal. Only here are phases looked at.
    pub fn dispatch(self, host: &mut H) {
        match admit(host.phase(), self.endpoint.action) {
            Admission::Run(_) => {
                let (slot, held) = self.slot.held();
                (self.call)(host, slot);
                host.publish();
                held.release();
            }
            Admission::Nothing => self.slot.send(Ok(Body::NONE)),
            Admission::Wait => host.park(self),
            Admission::Refused(refusal) => self.slot.send(Err(refusal.into())),
        }
    }
}

impl<H: 'static> ApiRequest<H> {
    /// The command's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.endpoint.name
    }

    /// Answers it without carrying it out.
    pub fn refuse(self, error: ApiError) {
        self.slot.send(Err(error));
    }
}

/// The body of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// Its media type.
    pub media_type: &'static str,
    /// Its bytes; empty if there is nothing to say.
    pub bytes: Vec<u8>,
}

impl Body {
    /// Nothing to say.
    pub const NONE: Self = Self { media_type: JSON, bytes: Vec::new() };
}

/// The encoded outcome of a request: a body, or what went wrong.
pub type Outcome = Result<Body, ApiError>;

/// Where an outcome goes. Exactly one is sent: a slot that is dropped sends an error.
pub struct ReplySlot(Option<Box<dyn FnOnce(Outcome) + Send>>);

impl ReplySlot {
    /// A slot that calls `deliver`, on the thread that answers.
    pub fn new(deliver: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self(Some(Box::new(deliver)))
    }

    /// Sends the outcome.
    pub fn send(mut self, outcome: Outcome) {
        self.deliver(outcome);
    }

    /// The same slot, whose outcome is kept back until it is released.
    fn held(self) -> (Self, Held) {
        let gate = Arc::new(Mutex::new(Gate::Closed(self, None)));
        let slot = Self::new({
            let gate = Arc::clone(&gate);
            move |outcome| Gate::send(&gate, outcome)
        });
        (slot, Held(gate))
    }

    fn deliver(&mut self, outcome: Outcome) {
        if let Some(deliver) = self.0.take() {
            deliver(outcome);
        }
    }
}

impl Drop for ReplySlot {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.deliver(Err(ApiError::new(Code::Internal, "the VMM ended the request without an answer")));
        }
    }
}

/// What stands between a handler and the client while the handler runs.
enum Gate {
    Closed(ReplySlot, Option<Outcome>),
    Open(ReplySlot),
    /// The outcome has gone through.
    Spent,
}

impl Gate {
    fn send(gate: &Mutex<Self>, outcome: Outcome) {
        let mut gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *gate, Self::Spent) {
            Self::Closed(slot, _) => *gate = Self::Closed(slot, Some(outcome)),
            Self::Open(slot) => slot.send(outcome),
            Self::Spent => {}
        }
    }
}

/// Lets an outcome go, at the latest when it is dropped.
struct Held(Arc<Mutex<Gate>>);

impl Held {
    fn release(self) {}
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut gate = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *gate, Gate::Spent) {
            Gate::Closed(slot, Some(outcome)) => slot.send(outcome),
            Gate::Closed(slot, None) => *gate = Gate::Open(slot),
            other => *gate = other,
        }
    }
}

/// The right, and the duty, to answer one request. Can be kept and sent to other threads.
pub struct Replier<R> {
    slot: ReplySlot,
    reply: PhantomData<fn(R)>,
}

impl<R: Encode> Replier<R> {
    /// A replier into `slot`.
    #[must_use]
    pub fn new(slot: ReplySlot) -> Self {
        Self { slot, reply: PhantomData }
    }

    /// Answers.
    pub fn reply(self, outcome: Result<R, ApiError>) {
        let body = |reply: R| Ok(Body { media_type: R::MEDIA_TYPE, bytes: reply.encode()? });
        self.slot.send(outcome.and_then(body));
    }
}

impl<H> fmt::Debug for Endpoint<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method.name(), self.name)
    }
}

impl<H> fmt::Debug for ApiRequest<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiRequest({:?})", self.endpoint)
    }
}

impl fmt::Debug for ReplySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplySlot").field("answered", &self.0.is_none()).finish()
    }
}

impl<R> fmt::Debug for Replier<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replier").finish_non_exhaustive()
    }
}
