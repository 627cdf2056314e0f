//! Raw connections to a server: TCP, TLS or a Unix socket, by address or by Sentinel; authenticated and ready for requests.
//!
//! What an URL says comes parsed by the crate `redis`, which the lanes use; only the connection itself is our own, because
//! links, subscriptions and transactions need the bytes. A name is resolved and a Sentinel asked anew for each connection,
//! so that a fail-over is followed.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::BytesMut;
use redis::{ConnectionAddr, ConnectionInfo};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::error::{Error, Happened, Result};
use crate::resp::reply::{Protocol, put_bulk, put_header};
use crate::resp::scan::{ScanState, reply_end};
use crate::shard::{BoxFuture, Dial, Socket};

const KEEPALIVE: Duration = Duration::from_secs(30);
/// Longest reply that a handshake reads.
const GREETING_BYTES_MAX: usize = 64 << 10;

/// Where the server is.
#[derive(Clone, Debug)]
enum Place {
    Fixed(ConnectionInfo),
    /// The master of a service, as the first Sentinel that answers says; `login` holds what the master wants.
    Sentinel {
        sentinels: Vec<ConnectionInfo>,
        service: String,
        login: ConnectionInfo,
    },
}

/// One server that raw connections can be opened to.
#[derive(Clone, Debug)]
pub struct Endpoint {
    shard: Arc<str>,
    place: Place,
}

impl Endpoint {
    pub fn new(shard: Arc<str>, info: ConnectionInfo) -> Endpoint {
        Endpoint { shard, place: Place::Fixed(info) }
    }

    pub fn sentinel(
        shard: Arc<str>,
        sentinels: Vec<ConnectionInfo>,
        service: String,
        login: ConnectionInfo,
    ) -> Endpoint {
        Endpoint { shard, place: Place::Sentinel { sentinels, service, login } }
    }

    async fn open(&self, protocol: Protocol) -> std::io::Result<Box<dyn Socket>> {
        match &self.place {
            Place::Fixed(info) => {
                let mut socket = connect(info.addr()).await?;
                greet(&mut socket, info, protocol).await?;
                Ok(socket)
            }
            Place::Sentinel { sentinels, service, login } => {
                let address = find_master(sentinels, service, login.addr()).await?;
                let mut socket = connect(&address).await?;
                greet(&mut socket, login, protocol).await?;
                Ok(socket)
            }
        }
    }
}

impl Dial for Endpoint {
    fn dial(&self, protocol: Protocol) -> BoxFuture<'_, Result<Box<dyn Socket>>> {
        Box::pin(async move {
            let opened = self.open(protocol).await;
            opened.map_err(|error| {
                Error::shard_down(&self.shard, &format!("cannot be connected to: {error}"), Happened::No)
            })
        })
    }
}

async fn connect(address: &ConnectionAddr) -> std::io::Result<Box<dyn Socket>> {
    match address {
        ConnectionAddr::Tcp(host, port) => Ok(Box::new(connect_tcp(host, *port).await?)),
        ConnectionAddr::TcpTls { host, port, insecure: false, .. } => {
            let name = ServerName::try_from(host.clone()).map_err(std::io::Error::other)?;
            let stream = connect_tcp(host, *port).await?;
            Ok(Box::new(TlsConnector::from(tls_config()).connect(name, stream).await?))
        }
        ConnectionAddr::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
        _ => Err(std::io::Error::other("this kind of address takes no ordinary commands")),
    }
}

async fn connect_tcp(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3))?;
    Ok(stream)
}

/// The public certificate authorities.
fn tls_config() -> Arc<ClientConfig> {
    static CONFIG: LazyLock<Arc<ClientConfig>> = LazyLock::new(|| {
        let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.into() };
        Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
    });
    CONFIG.clone()
}

/// Logs in, selects the database and the protocol. Every step must succeed.
async fn greet(socket: &mut Box<dyn Socket>, info: &ConnectionInfo, protocol: Protocol) -> std::io::Result<()> {
    let settings = info.redis_settings();
    let database = settings.db().to_string();
    let mut steps: Vec<Vec<&str>> = Vec::new();
    match (settings.username(), settings.password()) {
        (Some(user), Some(password)) => steps.push(vec!["AUTH", user, password]),
        (None, Some(password)) => steps.push(vec!["AUTH", password]),
        _ => {}
    }
    if protocol == Protocol::Resp3 {
        steps.push(vec!["HELLO", "3"]);
    }
    if settings.db() != 0 {
        steps.push(vec!["SELECT", &database]);
    }
    for step in steps {
        ask(socket, &step).await?;
    }
    Ok(())
}

/// Sends one request of a handshake and returns its reply; an error reply is an error.
async fn ask(socket: &mut Box<dyn Socket>, words: &[&str]) -> std::io::Result<BytesMut> {
    let mut request = BytesMut::new();
    put_header(&mut request, b'*', words.len());
    words.iter().for_each(|word| put_bulk(&mut request, word.as_bytes()));
    socket.write_all(&request).await?;
    let (mut reply, mut scan) = (BytesMut::new(), ScanState::default());
    loop {
        if socket.read_buf(&mut reply).await? == 0 || reply.len() > GREETING_BYTES_MAX {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if reply_end(&reply, &mut scan).map_err(std::io::Error::other)?.is_some() {
            break;
        }
    }
    match scan.is_error() {
        true => Err(std::io::Error::other(String::from_utf8_lossy(&reply).trim().to_owned())),
        false => Ok(reply),
    }
}

/// Asks the Sentinels in turn where the master of a service is.
async fn find_master(
    sentinels: &[ConnectionInfo],
    service: &str,
    like: &ConnectionAddr,
) -> std::io::Result<ConnectionAddr> {
    let mut failure = std::io::Error::other("no Sentinel is configured");
    for sentinel in sentinels {
        match ask_sentinel(sentinel, service).await {
            Ok((host, port)) => {
                return Ok(match like {
                    ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
                        ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
                    }
                    _ => ConnectionAddr::Tcp(host, port),
                });
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn ask_sentinel(sentinel: &ConnectionInfo, service: &str) -> std::io::Result<(String, u16)> {
    let mut socket = connect(sentinel.addr()).await?;
    greet(&mut socket, sentinel, Protocol::Resp2).await?;
    let reply = ask(&mut socket, &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", service]).await?;
    // `*2 $n host $m port`: every other line is a text.
    let text = String::from_utf8_lossy(&reply).into_owned();
    let mut lines = text.split("\r\n").skip(2).step_by(2);
    match (lines.next(), lines.next().and_then(|port| port.parse().ok())) {
        (Some(host), Some(port)) => Ok((host.to_owned(), port)),
        _ => Err(std::io::Error::other(format!("no Sentinel knows the service {service}"))),
    }
}
