//! A link between a device and a cloud whose two directions can be stopped, by hand or by itself,
//! and which can be cut.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes that a direction still carries before the link stops by itself.
type Left = Arc<AtomicI64>;

/// Stops and goes on when told to. Its threads end with their sockets.
pub struct Proxy {
    address: SocketAddr,
    pub up_stopped: Arc<AtomicBool>,
    pub down_stopped: Arc<AtomicBool>,
    down_left: Left,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    pub fn to(cloud: SocketAddr) -> Self {
        Self::counting(cloud, Arc::default())
    }

    /// As [`Proxy::to`]; `up_bytes` counts what has gone up.
    pub fn counting(cloud: SocketAddr, up_bytes: Arc<AtomicI64>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap(),
            up_stopped: Arc::default(),
            down_stopped: Arc::default(),
            down_left: Arc::new(AtomicI64::new(i64::MAX)),
            sockets: Arc::default(),
        };
        let [up, down] = [&proxy.up_stopped, &proxy.down_stopped].map(Arc::clone);
        let (left, sockets) = (Arc::clone(&proxy.down_left), Arc::clone(&proxy.sockets));
        std::thread::spawn(move || {
            for device in listener.incoming() {
                let Ok(device) = device else { return };
                while up.load(Ordering::Acquire) && down.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let Ok(cloud) = TcpStream::connect(cloud) else { continue };
                let [to_device, to_cloud] = [&device, &cloud].map(|end| end.try_clone().unwrap());
                sockets
                    .lock()
                    .unwrap()
                    .extend([&device, &cloud].map(|end| end.try_clone().unwrap()));
                let up_bytes = Arc::clone(&up_bytes);
                carry(device, to_cloud, up.clone(), move |count| {
                    up_bytes.fetch_add(count, Ordering::Relaxed);
                });
                let (up, down, left) = (up.clone(), down.clone(), left.clone());
                carry(cloud, to_device, down.clone(), move |count| {
                    if left.fetch_sub(count, Ordering::Relaxed) < count {
                        up.store(true, Ordering::Release);
                        down.store(true, Ordering::Release);
                    }
                });
            }
        });
        proxy
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops both directions, or lets them go on.
    pub fn stop(&self, stopped: bool) {
        if !stopped {
            self.down_left.store(i64::MAX, Ordering::Relaxed);
        }
        self.up_stopped.store(stopped, Ordering::Release);
        self.down_stopped.store(stopped, Ordering::Release);
    }

    /// Lets a device have fewer than this many bytes, and stops both directions then: the answer
    /// that it waits for can't end, however fast it is computed and however late a test looks.
    pub fn stop_after(&self, bytes_down: i64) {
        self.down_left.store(bytes_down, Ordering::Relaxed);
    }

    /// Waits until it has stopped by itself.
    pub fn wait_until_stopped(&self) {
        super::eventually("the link stops", || self.down_stopped.load(Ordering::Acquire));
    }

    /// Closes the connections that go through it. New ones wait while it is stopped.
    pub fn cut(&self) {
        for socket in self.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Carries what comes; `counts` hears of the bytes before they go on.
fn carry(
    mut from: TcpStream,
    mut to: TcpStream,
    stopped: Arc<AtomicBool>,
    counts: impl Fn(i64) + Send + 'static,
) {
    std::thread::spawn(move || {
        let mut bytes = vec![0; 16 << 10];
        while let Ok(count) = from.read(&mut bytes)
            && count > 0
        {
            counts(count as i64);
            while stopped.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    });
}
