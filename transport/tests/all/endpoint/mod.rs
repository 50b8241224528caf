//! Endpoints over each link: sessions, reconnects, unknown peers, counts.
mod counts;
mod handshakes;
mod pair;
mod reconnect;
mod repeat;

use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::endpoint::GoneError;
use hat_transport::frame::{Kind, Priority};
use hat_transport::link::LinkKind;
use hat_transport::message::{
    Arrivals, CloseCode, Message, Open, Opened, OutputHead, RowsHead, Want,
};
use pair::{Pair, kinds, take_frame, take_gone};

/// A session from open to ended, with rows up and output down.
fn a_session_runs(kind: LinkKind) {
    let mut pair = Pair::new(kind);
    let (cloud_id, resumed) = pair.up();
    assert!(!resumed);
    let device_id = pair.dialled;
    let open = Open {
        entry_layer: 2,
        exit_layer: 30,
        codec: 1,
        kv_type: 1,
        arithmetic_id: 1,
        rows_max: 100,
        pages: &[[7; 16]],
    };
    pair.device.send_message(device_id, 7, &Message::Open(open)).unwrap();
    let frame = pair.until(|pair| take_frame(&mut pair.cloud_events));
    assert_eq!(Message::decode(frame.kind, &frame.body).unwrap(), Message::Open(open));
    drop(frame);
    pair.cloud.send_message(cloud_id, 7, &Message::Opened(Opened { pages: 0 })).unwrap();
    let frame = pair.until(|pair| take_frame(&mut pair.device_events));
    assert_eq!((frame.kind, frame.session, frame.body.len()), (Kind::Opened, 7, 2));

    rows_go_up(&mut pair);
    output_comes_down(&mut pair, cloud_id);

    let traffic = pair.device.traffic(device_id).unwrap();
    assert!(traffic.sent_bytes > 2 * 1152 && traffic.sent_bytes < 2 * 1152 + 600, "{traffic:?}");
    assert!(traffic.received_bytes > 1152 && traffic.received_bytes < 1152 + 600, "{traffic:?}");
    pair.device.close(device_id, CloseCode::Done, "enough");
    let gone = pair.until(|pair| take_gone(&mut pair.cloud_events));
    let GoneError::ClosedByPeer { code, reason, .. } = gone else { panic!("{gone}") };
    assert_eq!((code, reason.as_str()), (CloseCode::Done, "enough"));
    assert_eq!(take_gone(&mut pair.device_events), Some(GoneError::Closed));
}

const ROW_BYTES: usize = 1152;

fn rows_go_up(pair: &mut Pair) {
    let head = RowsHead {
        first_id: 1,
        count: 2,
        tree: false,
        more: false,
        decided: false,
        want: Want::Last,
        parent: 0,
        commit: 0,
    };
    let mut body =
        pair.device.buffer(Priority::Verify, head.payload_start() + 2 * ROW_BYTES).unwrap();
    let payload = head.encode(&[], &mut body);
    body[payload..].fill(3);
    pair.device.send(pair.dialled, Kind::Rows, 7, Priority::Verify, body).unwrap();
    let frame = pair.until(|pair| take_frame(&mut pair.cloud_events));
    let Ok(Message::Rows(rows)) = Message::decode(frame.kind, &frame.body) else { panic!() };
    assert_eq!(rows.head, head);
    assert_eq!(rows.payload, [3; 2 * ROW_BYTES]);
}

fn output_comes_down(pair: &mut Pair, cloud_id: ConnectionId) {
    let arrivals = Arrivals::default();
    let head = OutputHead { count: 1, queue_us: 1, step_us: 2, step_rows: 2, arrivals };
    let mut body = pair.cloud.buffer(Priority::Verify, head.payload_start() + ROW_BYTES).unwrap();
    let payload = head.encode(&[2], &mut body);
    body[payload..].fill(4);
    pair.cloud.send(cloud_id, Kind::Output, 7, Priority::Verify, body).unwrap();
    let frame = pair.until(|pair| take_frame(&mut pair.device_events));
    let Ok(Message::Output(output)) = Message::decode(frame.kind, &frame.body) else { panic!() };
    assert_eq!(output.ids.iter().collect::<Vec<_>>(), [2]);
    assert_eq!(output.payload, [4; ROW_BYTES]);
}

#[test]
fn a_session_runs_over_each_link() {
    kinds().for_each(a_session_runs);
}
