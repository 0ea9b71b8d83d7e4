//! Two sites on loopback: how fast batches become acknowledged, and what that costs.
//! `cargo run --profile ci -p farhaven-wan --example link_throughput [MiB] [batch KiB]`

use std::time::{Duration, Instant};

use bytes::Bytes;
use farhaven_wan::{Identity, LinkOptions, Node, NodeOptions, PeerEvent, PeerRecord};

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|argument| argument.parse::<u64>());
    let total = arguments.next().unwrap_or(Ok(512))? << 20;
    let batch = arguments.next().unwrap_or(Ok(256))? << 10;
    let directory =
        std::env::temp_dir().join(format!("farhaven-throughput-{}", std::process::id()));
    let mut sites = Vec::new();
    for name in ["east", "west"] {
        let identity = Identity::load_or_create(&directory.join(name), name)?;
        let options = NodeOptions {
            listen: "127.0.0.1:0".parse()?,
            link: LinkOptions::default(),
        };
        sites.push((identity.key(), Node::start(&identity, options)?));
    }
    std::fs::remove_dir_all(&directory)?;
    let (Some((west, at_west)), Some((east, at_east))) = (sites.pop(), sites.pop()) else {
        return Ok(());
    };
    let record = |site: &str, key, node: &Node, dial| PeerRecord {
        site: site.to_owned(),
        key,
        addresses: vec![node.local_addr().to_string()],
        dial,
    };
    let receiver = at_east.trust(record("west", west, &at_west, false));
    let sender = at_west.trust(record("east", east, &at_east, true));
    tokio::spawn(async move {
        while let Some(event) = receiver.event().await {
            if let PeerEvent::Data { seq, .. } = event {
                receiver.durable(&[seq]);
            }
        }
    });
    while !sender.status().connected {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let bytes = Bytes::from(vec![0x5a; usize::try_from(batch)?]);
    let count = total.div_ceil(batch);
    let began = Instant::now();
    for seq in 0..count {
        sender.send_data(seq, bytes.clone()).await?;
    }
    sender.all_acknowledged(count).await?;
    let took = began.elapsed().as_secs_f64();
    let status = sender.status();
    println!(
        "{} MiB in batches of {} KiB: {:.0} MB/s, {:.3} wire bytes a byte, {} of {} packets lost",
        total >> 20,
        batch >> 10,
        total as f64 / 1e6 / took,
        status.udp_tx_bytes as f64 / total as f64,
        status.lost_packets,
        status.sent_packets,
    );
    at_west.shutdown().await;
    at_east.shutdown().await;
    Ok(())
}
