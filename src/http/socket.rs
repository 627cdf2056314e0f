//! The socket under one HTTP connection: answers are written in bounded time, and it is known when they are out.
//!
//! A client that asks and does not read would hold its connection for ever, so there is a bound on how long all that is to be
//! written may take, from the moment that the kernel takes no more. What is written ends with a flush: until then the requests
//! that were answered count as [`UnderWay`], and a drain waits for them.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// One request, counted from its beginning until its answer is out or its connection gone.
#[derive(Debug)]
pub struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    pub fn begin(count: &Arc<AtomicUsize>) -> UnderWay {
        count.fetch_add(1, Ordering::Relaxed);
        UnderWay(count.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The last request of a connection that was answered and whose answer is not out; it stands for those before it.
#[derive(Clone, Debug, Default)]
pub struct Answered(Arc<Mutex<Option<UnderWay>>>);

impl Answered {
    pub fn set(&self, request: Option<UnderWay>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = request;
    }
}

pub struct Socket<S> {
    inner: S,
    answered: Answered,
    wait: Duration,
    /// Set while there is more to be written than the kernel takes.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> Socket<S> {
    pub fn new(inner: S, answered: Answered, wait: Duration) -> Socket<S> {
        Socket { inner, answered, wait, deadline: None }
    }

    fn in_time<T>(&mut self, written: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            return written;
        }
        let wait = self.wait;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(wait)));
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its answers")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.in_time(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.in_time(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.inner).poll_flush(context))?;
        // hyper flushes when it has nothing left to write.
        self.deadline = None;
        self.answered.set(None);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn on_a_runtime<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
    }

    #[test]
    fn a_client_that_does_not_read_is_given_up_and_one_that_reads_is_not() {
        on_a_runtime(async {
            let wait = Duration::from_secs(3);
            let (ours, mut theirs) = tokio::io::duplex(8);
            let mut socket = Socket::new(ours, Answered::default(), wait);
            for _ in 0..3 {
                let (written, read) = tokio::join!(
                    async {
                        socket.write_all(&[0; 64]).await?;
                        socket.flush().await
                    },
                    async {
                        // Three together are longer than one may be.
                        tokio::time::sleep(wait * 2 / 5).await;
                        theirs.read_exact(&mut [0; 64]).await
                    }
                );
                written.unwrap();
                read.unwrap();
            }
            let error = socket.write_all(&[0; 64]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        });
    }

    #[test]
    fn a_request_is_under_way_until_its_answer_is_flushed_or_its_connection_is_gone() {
        on_a_runtime(async {
            let count: Arc<AtomicUsize> = Arc::default();
            let answered = Answered::default();
            let (ours, _theirs) = tokio::io::duplex(64);
            let mut socket = Socket::new(ours, answered.clone(), Duration::from_secs(1));
            let counted = || count.load(Ordering::Relaxed);
            answered.set(Some(UnderWay::begin(&count)));
            answered.set(Some(UnderWay::begin(&count)));
            socket.write_all(b"answers").await.unwrap();
            assert_eq!(counted(), 1, "the later stands for both");
            socket.flush().await.unwrap();
            assert_eq!(counted(), 0);
            answered.set(Some(UnderWay::begin(&count)));
            drop((socket, answered));
            assert_eq!(counted(), 0);
        });
    }
}
