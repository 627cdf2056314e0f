//! Answers that cross threads.
//!
//! To wake a task of another thread's runtime is a system call each time, whatever that thread does. A thread with a post
//! is woken once for all answers that come for it before it looks; within a thread an answer goes straight to its task.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, oneshot};

type Letter = Box<dyn FnOnce() + Send>;

/// What has come for one thread. There is one for each thread of the process, for as long as it runs.
#[derive(Default)]
struct Post {
    letters: Mutex<Vec<Letter>>,
    bell: Notify,
}

thread_local! {
    static HERE: Cell<Option<&'static Post>> = const { Cell::new(None) };
}

/// Gives this thread a post; what is returned empties it and never ends.
pub fn open() -> impl Future<Output = ()> + Send {
    let post: &'static Post = Box::leak(Box::default());
    HERE.set(Some(post));
    async move {
        loop {
            post.bell.notified().await;
            let letters = std::mem::take(&mut *post.letters.lock().unwrap_or_else(PoisonError::into_inner));
            letters.into_iter().for_each(|letter| letter());
        }
    }
}

/// The sender of one answer to whoever asks on this thread.
pub struct Reply<T> {
    sender: oneshot::Sender<T>,
    home: Option<&'static Post>,
}

/// A way for one answer. Its receiver may also be dropped: the answer then is.
pub fn reply<T>() -> (Reply<T>, oneshot::Receiver<T>) {
    let (sender, receiver) = oneshot::channel();
    (Reply { sender, home: HERE.get() }, receiver)
}

impl<T: Send + 'static> Reply<T> {
    pub fn send(self, answer: T) {
        let Reply { sender, home } = self;
        let elsewhere = home.filter(|home| !HERE.get().is_some_and(|here| std::ptr::eq(here, *home)));
        // What nobody awaits any more is dropped here and now: it may be jobs that are to go back.
        let Some(post) = elsewhere.filter(|_| !sender.is_closed()) else { return drop(sender.send(answer)) };
        let mut letters = post.letters.lock().unwrap_or_else(PoisonError::into_inner);
        letters.push(Box::new(move || drop(sender.send(answer))));
        let is_first = letters.len() == 1;
        drop(letters);
        if is_first {
            post.bell.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().unwrap()
    }

    #[test]
    fn answers_reach_the_thread_that_asked_from_there_and_from_elsewhere() {
        runtime().block_on(async {
            tokio::spawn(open());
            let (here, receiver) = reply();
            here.send(1);
            assert_eq!(receiver.await, Ok(1));
            let (replies, receivers): (Vec<_>, Vec<_>) = (0..100).map(|_| reply()).unzip();
            let thread = std::thread::spawn(|| replies.into_iter().enumerate().for_each(|(n, reply)| reply.send(n)));
            for (n, receiver) in receivers.into_iter().enumerate() {
                assert_eq!(receiver.await, Ok(n));
            }
            thread.join().unwrap();
        });
    }

    #[test]
    fn an_answer_that_is_never_given_is_heard_of_and_one_that_nobody_awaits_is_dropped() {
        runtime().block_on(async {
            tokio::spawn(open());
            let (lost, receiver) = reply::<u8>();
            drop(lost);
            assert!(receiver.await.is_err());
            let told = std::sync::Arc::new(());
            let (unread, receiver) = reply();
            drop(receiver);
            let answer = told.clone();
            std::thread::spawn(move || unread.send(answer)).join().unwrap();
            assert_eq!(std::sync::Arc::strong_count(&told), 1);
        });
    }
}
