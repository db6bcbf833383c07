//! Commands about the VMM itself.

use super::command;
use crate::config::LogLevelConfig;
use crate::info::{JsonText, OpenMetrics, PingReply};

command! {
    /// Says that the VMM is there, and its version.
    Ping(()) -> PingReply, Get "vmm.ping", Ping
}

command! {
    /// Ends the VM and the VMM.
    Shutdown(()) -> (), Put "vmm.shutdown", VmmShutdown
}

command! {
    /// Gives the OpenAPI document of this API.
    OpenApi(()) -> JsonText, Get "vmm.openapi", OpenApi
}

command! {
    /// Gives the VMM's and the VM's metrics as OpenMetrics text.
    Metrics(()) -> OpenMetrics, Get "vmm.metrics", Metrics
}

command! {
    /// Gives the level of the log.
    LogLevel(()) -> LogLevelConfig, Get "vmm.log-level", LogLevel
}

command! {
    /// Sets the level of the log; gives the one before.
    SetLogLevel(LogLevelConfig) -> LogLevelConfig, Put "vmm.log-level", LogLevel
}
