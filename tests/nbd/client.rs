//! An NBD client that says exactly what it is told to, right or wrong.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A client that speaks byte by byte.
pub(crate) struct Client(pub(crate) UnixStream);

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Client {
        let mut client = Client(UnixStream::connect(socket).await.unwrap());
        let mut greeting = [0; 18];
        client.0.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        client.0.write_u32(3).await.unwrap();
        client
    }

    pub(crate) async fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        self.0.write_all(b"IHAVEOPT").await.unwrap();
        self.0.write_u32(option).await.unwrap();
        self.0.write_u32(data.len() as u32).await.unwrap();
        self.0.write_all(data).await.unwrap();
        loop {
            assert_eq!(self.0.read_u64().await.unwrap(), 0x3e889045565a9);
            assert_eq!(self.0.read_u32().await.unwrap(), option);
            let kind = self.0.read_u32().await.unwrap();
            let length = self.0.read_u32().await.unwrap();
            let mut data = vec![0; length as usize];
            self.0.read_exact(&mut data).await.unwrap();
            if kind == 1 || kind >= 1 << 31 {
                return kind;
            }
        }
    }

    /// Opens an export; with structured replies and allocation if wanted.
    pub(crate) async fn go(socket: &Path, export: &str, structured: bool) -> Client {
        let mut client = Client::connect(socket).await;
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
        if structured {
            assert_eq!(client.option(8, &[]).await, 1);
            let query = [&name[..], &[0, 0, 0, 1, 0, 0, 0, 15], b"base:allocation"].concat();
            assert_eq!(client.option(10, &query).await, 1);
        }
        assert_eq!(client.option(7, &[&name[..], &[0, 0]].concat()).await, 1);
        client
    }

    pub(crate) async fn request(
        &mut self,
        flags: u16,
        command: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) {
        self.0.write_u32(0x25609513).await.unwrap();
        self.0.write_u16(flags).await.unwrap();
        self.0.write_u16(command).await.unwrap();
        self.0.write_u64(42).await.unwrap();
        self.0.write_u64(offset).await.unwrap();
        self.0.write_u32(length).await.unwrap();
        self.0.write_all(data).await.unwrap();
    }

    /// A simple reply's error, and its data if it has none.
    pub(crate) async fn simple(&mut self, length: usize) -> (u32, Vec<u8>) {
        assert_eq!(self.0.read_u32().await.unwrap(), 0x67446698);
        let error = self.0.read_u32().await.unwrap();
        assert_eq!(self.0.read_u64().await.unwrap(), 42);
        let mut data = vec![0; if error == 0 { length } else { 0 }];
        self.0.read_exact(&mut data).await.unwrap();
        (error, data)
    }

    /// One chunk: flags, kind, payload.
    pub(crate) async fn chunk(&mut self) -> (u16, u16, Vec<u8>) {
        assert_eq!(self.0.read_u32().await.unwrap(), 0x668e33ef);
        let (flags, kind) = (
            self.0.read_u16().await.unwrap(),
            self.0.read_u16().await.unwrap(),
        );
        assert_eq!(self.0.read_u64().await.unwrap(), 42);
        let length = self.0.read_u32().await.unwrap();
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).await.unwrap();
        (flags, kind, payload)
    }

    /// Reads until the server has closed; fails if it keeps the connection open.
    pub(crate) async fn ends(&mut self) {
        let mut rest = Vec::new();
        // An error is an end too: closed with bytes unread.
        let _ = tokio::time::timeout(Duration::from_secs(5), self.0.read_to_end(&mut rest))
            .await
            .expect("still open");
    }
}
