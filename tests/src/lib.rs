#![doc = include_str!("../README.md")]

pub mod apt;
pub mod base64;
pub mod cache;
pub mod error;
pub mod harness;
pub mod hostkvm;
pub mod image;
pub mod kernel_image;
pub mod kernels;
pub mod nested;
pub mod progress;
pub mod report;
pub mod run;
pub mod tiny;
pub mod toolbox;
