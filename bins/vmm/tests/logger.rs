//! The log of a process, through the macros of `log`: one test, for a process has one log.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use log::LevelFilter;
use vmm::logger::{self, LogError, LogFormat, LogOptions};

#[test]
fn the_level_changes_at_run_time_and_fields_arrive() {
    // Nothing to change before there is a log.
    assert_eq!(
        (logger::level(), logger::set_level(LevelFilter::Trace)),
        (LevelFilter::Off, LevelFilter::Off)
    );
    logger::set_vm(Some("nobody's".to_owned()));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let options = LogOptions {
        filter: "logger::loud=debug,logger::quiet=error".parse().unwrap(),
        format: LogFormat::Json,
        file: Some(path.clone()),
        ..LogOptions::default()
    };
    logger::init(&options).unwrap();
    assert!(matches!(logger::init(&options), Err(LogError::Again)));
    let say = |what: &str| {
        log::info!(device = "_disk0", queue = 1_u16; "{what}");
        log::warn!(target: "logger::quiet", "quiet {what}");
        log::debug!(target: "logger::loud::inner", "loud {what}");
    };
    say("at warn");
    assert_eq!(logger::set_level(LevelFilter::Info), LevelFilter::Warn);
    assert_eq!(logger::level(), LevelFilter::Info);
    logger::set_vm(Some("web".to_owned()));
    std::thread::scope(|scope| scope.spawn(|| say("at info")).join().unwrap());
    assert_eq!(logger::set_level(LevelFilter::Off), LevelFilter::Info);
    logger::set_vm(None);
    say("at off");

    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let messages: Vec<&str> = lines.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(messages, ["loud at warn", "at info", "loud at info", "loud at off"]);
    let info = lines.iter().find(|line| line["message"] == "at info").unwrap();
    assert_eq!((&info["device"], &info["queue"]), (&"_disk0".into(), &1.into()));
    let vms: Vec<&serde_json::Value> = lines.iter().map(|line| &line["vm"]).collect();
    assert_eq!(vms, [&serde_json::Value::Null, &"web".into(), &"web".into(), &serde_json::Value::Null]);
}
