//! A link between a device and a cloud whose two directions can be stopped by hand.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Stops and goes on when told to. Its threads end with their sockets.
pub struct Proxy {
    address: SocketAddr,
    pub up_stopped: Arc<AtomicBool>,
    pub down_stopped: Arc<AtomicBool>,
}

impl Proxy {
    pub fn to(cloud: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let [up_stopped, down_stopped] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let flags = (Arc::clone(&up_stopped), Arc::clone(&down_stopped));
        std::thread::spawn(move || {
            for device in listener.incoming() {
                let Ok(device) = device else { return };
                let Ok(cloud) = TcpStream::connect(cloud) else { continue };
                carry(device.try_clone().unwrap(), cloud.try_clone().unwrap(), flags.0.clone());
                carry(cloud, device, flags.1.clone());
            }
        });
        Self { address, up_stopped, down_stopped }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops both directions, or lets them go on.
    pub fn stop(&self, stopped: bool) {
        self.up_stopped.store(stopped, Ordering::Release);
        self.down_stopped.store(stopped, Ordering::Release);
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, stopped: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let mut bytes = vec![0; 16 << 10];
        while let Ok(count) = from.read(&mut bytes)
            && count > 0
        {
            while stopped.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
        let _ = from.shutdown(std::net::Shutdown::Both);
    });
}
