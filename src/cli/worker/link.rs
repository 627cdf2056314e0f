//! A worker's connection to the server: opened when it is needed, and again when it broke.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, IntoConnectionInfo, RedisError, Value};

use super::BLOCK_MS;

const CONNECT_WAIT: Duration = Duration::from_secs(5);
/// For an answer beyond the wait of the command itself.
const ANSWER_WAIT: Duration = Duration::from_secs(15);

/// Where the server is, and the way in.
#[derive(Clone)]
pub struct Server {
    client: Client,
    shown: String,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Server {
    pub fn new(address: &str, password_file: Option<&Path>) -> Result<Server, String> {
        let url = if address.contains("://") { address.to_owned() } else { format!("redis://{address}") };
        let bad = |error: RedisError| format!("--server: {error}: expected HOST:PORT or a redis:// URL");
        let mut info = url.as_str().into_connection_info().map_err(bad)?;
        let shown = info.addr().to_string();
        if let Some(file) = password_file {
            let text = std::fs::read_to_string(file)
                .map_err(|error| format!("--password-file {}: {error}", file.display()))?;
            let settings = info.redis_settings().clone().set_password(text.trim_end());
            info = info.set_redis_settings(settings);
        }
        Ok(Server { client: Client::open(info).map_err(bad)?, shown })
    }
}

/// Why a call got no answer that helps.
#[derive(Debug)]
pub enum CallError {
    /// The server's word and its text.
    Refused(String, String),
    /// No answer; whether it happened is not known.
    Broken(String),
}

impl CallError {
    /// Whether to say it again is in vain.
    pub fn is_final(&self) -> bool {
        match self {
            CallError::Refused(code, _) => {
                !matches!(code.as_str(), "SHARDDOWN" | "OVERLOADED" | "LOADING" | "TRYAGAIN")
            }
            CallError::Broken(_) => false,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Refused(code, text) => write!(f, "{code} {text}"),
            CallError::Broken(text) => f.write_str(text),
        }
    }
}

impl From<RedisError> for CallError {
    fn from(error: RedisError) -> CallError {
        match error.code() {
            Some(code) => CallError::Refused(code.into(), error.detail().unwrap_or_default().into()),
            None => CallError::Broken(error.to_string()),
        }
    }
}

pub struct Link {
    server: Server,
    connection: Option<MultiplexedConnection>,
}

impl Link {
    pub fn new(server: Server) -> Link {
        Link { server, connection: None }
    }

    pub async fn call(&mut self, command: &Cmd) -> Result<Value, CallError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(CONNECT_WAIT))
                    .set_response_timeout(Some(Duration::from_millis(BLOCK_MS) + ANSWER_WAIT));
                self.server.client.get_multiplexed_async_connection_with_config(&config).await?
            }
        };
        let answer = command.query_async::<Value>(&mut connection).await.map_err(CallError::from);
        // A connection that broke is not used again: what it would answer next belongs to something else.
        if !matches!(answer, Err(CallError::Broken(_))) {
            self.connection = Some(connection);
        }
        answer
    }
}
