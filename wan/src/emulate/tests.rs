//! The relay over real sockets; what a pipe does with time is tested in `pipe.rs`.

use std::net::UdpSocket;
use std::time::Duration;

use super::*;

fn emulator(target: &UdpSocket, link: &str) -> Emulator {
    let target = target.local_addr().unwrap();
    Emulator::start(EmulatorOptions::new(target, link.parse().unwrap())).unwrap()
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

#[test]
fn datagrams_go_there_and_replies_come_back_after_the_delay() {
    let target = socket();
    let link = emulator(&target, "100mbit,60ms");
    let clients = [socket(), socket()];
    let mut buffer = [0; 2000];
    for (index, client) in clients.iter().enumerate() {
        let sent = Instant::now();
        client.send_to(&[index as u8; 100], link.addr()).unwrap();
        let (length, from) = target.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], &[index as u8; 100]);
        target.send_to(&buffer[..length], from).unwrap();
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], &[index as u8; 100]);
        assert_eq!(from, link.addr());
        // Never early; how late depends on the machine's load, so it is not asserted.
        assert!(sent.elapsed() >= Duration::from_millis(60));
    }
    let counters = link.counters();
    assert_eq!(counters.forward.packets, 2);
    assert_eq!(counters.forward.bytes, 2 * 128);
    assert_eq!(counters.backward.packets, 2);
}

#[test]
fn a_burst_of_mixed_sizes_arrives_whole_and_in_order() {
    let target = socket();
    let link = emulator(&target, "200mbit,10ms");
    let client = socket();
    let sizes = [1200, 1200, 700, 1, 1452, 1452, 1452, 300];
    for (index, size) in sizes.iter().cycle().take(80).enumerate() {
        client
            .send_to(&vec![index as u8; *size], link.addr())
            .unwrap();
    }
    let mut buffer = [0; 2000];
    for (index, size) in sizes.iter().cycle().take(80).enumerate() {
        let (length, _) = target.recv_from(&mut buffer).unwrap();
        assert_eq!(length, *size);
        assert!(buffer[..length].iter().all(|byte| *byte == index as u8));
    }
}

#[test]
fn a_cut_link_carries_nothing_until_it_is_mended() {
    let target = socket();
    target
        .set_read_timeout(Some(Duration::from_millis(150)))
        .unwrap();
    let link = emulator(&target, "100mbit,10ms");
    let client = socket();
    let mut buffer = [0; 100];
    link.cut(true);
    client.send_to(b"lost", link.addr()).unwrap();
    assert!(target.recv_from(&mut buffer).is_err());
    assert_eq!(link.counters().forward.cut, 1);
    link.cut(false);
    client.send_to(b"kept", link.addr()).unwrap();
    target
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let (length, _) = target.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"kept");
}

#[test]
fn what_exceeds_the_path_is_dropped() {
    let target = socket();
    let link = emulator(&target, "100mbit,10ms");
    let client = socket();
    client
        .send_to(&[1; LARGEST_PAYLOAD + 1], link.addr())
        .unwrap();
    client.send_to(&[2; LARGEST_PAYLOAD], link.addr()).unwrap();
    let mut buffer = [0; 2000];
    let (length, _) = target.recv_from(&mut buffer).unwrap();
    assert_eq!((length, buffer[0]), (LARGEST_PAYLOAD, 2));
}

#[test]
fn a_target_that_comes_up_late_is_reached() {
    let target = socket();
    let addr = target.local_addr().unwrap();
    let link = emulator(&target, "100mbit,1ms");
    drop(target);
    let client = socket();
    client.send_to(b"nobody", link.addr()).unwrap();
    thread::sleep(Duration::from_millis(50));
    let target = UdpSocket::bind(addr).unwrap();
    target
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut buffer = [0; 100];
    // The first send may still report the earlier refusal; a client repeats itself.
    let reached = (0..20).any(|_| {
        client.send_to(b"somebody", link.addr()).unwrap();
        target.recv_from(&mut buffer).is_ok()
    });
    assert!(reached);
}
