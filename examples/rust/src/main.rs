//! A linear model that muond trains: cargo run -- ws://127.0.0.1:8787

use rmpv::Value;
use tungstenite::{Message, WebSocket};

type Socket = WebSocket<tungstenite::stream::MaybeTlsStream<std::net::TcpStream>>;

const OUTPUTS: usize = 8;
const INPUTS: usize = 16;
const SAMPLES: usize = 64;
const STEPS: u64 = 40;

fn map(pairs: Vec<(&str, Value)>) -> Value {
    Value::Map(pairs.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

fn send(socket: &mut Socket, frame: Value) {
    let mut message = Vec::new();
    rmpv::encode::write_value(&mut message, &frame).expect("a Vec takes all bytes");
    socket.send(Message::binary(message)).expect("the connection is lost");
}

/// The next frame. Control messages, which `read` answers, are none.
fn next(socket: &mut Socket) -> Value {
    loop {
        let Message::Binary(message) = socket.read().expect("the connection is lost") else { continue };
        let frame = rmpv::decode::read_value(&mut &message[..]).expect("a frame is msgpack");
        assert!(frame["type"].as_str() != Some("error"), "{frame}");
        return frame;
    }
}

/// Numbers in [0, 1): the upper bits of a linear congruential generator.
fn random(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 40) as f32 / (1u64 << 24) as f32
}

fn main() {
    let url = std::env::args().nth(1).expect("the address of the service") + "/v1/stream";
    let (mut socket, _) = tungstenite::connect(url).expect("no connection");
    let (shape, lr) = (vec![Value::from(OUTPUTS), Value::from(INPUTS)], Value::F64(0.05));
    let group = map(vec![("name", "all".into()), ("algorithm", "muon".into()), ("lr", lr), ("weight_decay", 0.0.into())]);
    let parameter = map(vec![("name", "w".into()), ("shape", shape.into()), ("group", "all".into())]);
    let run = format!("rust-{}", std::process::id());
    let lists = vec![("groups", Value::Array(vec![group])), ("parameters", Value::Array(vec![parameter]))];
    send(&mut socket, map([vec![("type", "open".into()), ("protocol", 1.into()), ("run", run.into())], lists].concat()));
    let chunk_bytes = next(&mut socket)["limits"]["chunk_bytes"].as_u64().expect("an integer") as usize;
    let mut seed = 1;
    let target: Vec<f32> = (0..OUTPUTS * INPUTS).map(|_| random(&mut seed) - 0.5).collect(); // y = target · x is learned
    let mut weights = vec![0f32; OUTPUTS * INPUTS];
    let (mut largest, mut loss) = (0f32, 0f32);
    for step in 1..=STEPS {
        let mut gradient = vec![0f32; weights.len()];
        loss = 0.0;
        for _ in 0..SAMPLES {
            let (feature, x) = ((random(&mut seed) * INPUTS as f32) as usize, random(&mut seed) * 2.0 - 1.0);
            for at in (feature..weights.len()).step_by(INPUTS) {
                let wrong = (weights[at] - target[at]) * x; // each sample has one feature
                gradient[at] += wrong * x / SAMPLES as f32;
                loss += wrong * wrong / 2.0 / SAMPLES as f32;
            }
        }
        println!("step {step}: loss {loss:.5}");
        largest = largest.max(loss);
        let bytes: Vec<u8> = gradient.iter().flat_map(|value| value.to_le_bytes()).collect();
        for (i, chunk) in bytes.chunks(chunk_bytes).enumerate() {
            let place = vec![("step", step.into()), ("parameter", 0.into()), ("offset", (i * chunk_bytes).into())];
            send(&mut socket, map([vec![("type", "gradient".into())], place, vec![("data", chunk.into())]].concat()));
        }
        send(&mut socket, map(vec![("type", "end".into()), ("step", step.into())]));
        let (mut update, mut scale, mut decay) = (Vec::new(), 0.0, 0.0);
        loop {
            let frame = next(&mut socket);
            match frame["type"].as_str() {
                Some("receipt") => break,
                Some("update") => update.extend(frame["data"].as_slice().unwrap_or_default()),
                _ => continue,
            }
            scale += frame["scale"].as_f64().unwrap_or(0.0); // only the first chunk has factors
            decay += frame["decay"].as_f64().unwrap_or(0.0);
        }
        for (weight, data) in weights.iter_mut().zip(update.chunks_exact(4)) {
            let data = f32::from_le_bytes(data.try_into().expect("four bytes"));
            *weight = (1.0 - decay) as f32 * *weight + scale as f32 * data;
        }
    }
    socket.close(None).expect("the connection is lost");
    assert!(loss < largest / 4.0, "the loss did not fall");
}
