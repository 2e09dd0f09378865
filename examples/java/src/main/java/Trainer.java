import static org.msgpack.value.ValueFactory.*;
import java.net.URI;
import java.net.http.*;
import java.nio.*;
import java.util.*;
import java.util.concurrent.*;
import org.msgpack.core.MessagePack;
import org.msgpack.value.Value;

/** A linear model that muond trains: java -cp … Trainer ws://127.0.0.1:8787 */
public class Trainer implements WebSocket.Listener {
  static final int OUTPUTS = 8, INPUTS = 16, SAMPLES = 64, STEPS = 40;
  final LinkedBlockingQueue<Object> messages = new LinkedBlockingQueue<>(); // bytes, or why there are no more
  final java.io.ByteArrayOutputStream partial = new java.io.ByteArrayOutputStream();
  WebSocket socket;

  public CompletionStage<?> onBinary(WebSocket socket, ByteBuffer data, boolean last) {
    while (data.hasRemaining()) partial.write(data.get());
    if (last) { messages.add(partial.toByteArray()); partial.reset(); }
    socket.request(1);
    return null;
  }

  public void onError(WebSocket socket, Throwable error) { messages.add(error); }
  public CompletionStage<?> onClose(WebSocket socket, int code, String reason) { messages.add(code); return null; }

  /** Keys and values in turn: integers, doubles, texts, bytes, or Values. */
  static Value map(Object... pairs) { return newMap(Arrays.stream(pairs).map(Trainer::value).toArray(Value[]::new)); }
  static Value value(Object of) {
    if (of instanceof Integer number) return newInteger(number);
    if (of instanceof Double number) return newFloat(number);
    return of instanceof byte[] bytes ? newBinary(bytes) : of instanceof String text ? newString(text) : (Value) of;
  }

  void send(Object... pairs) throws Exception {
    var packer = MessagePack.newDefaultBufferPacker().packValue(map(pairs));
    socket.sendBinary(ByteBuffer.wrap(((org.msgpack.core.MessageBufferPacker) packer).toByteArray()), true).join();
  }

  Map<Value, Value> next() throws Exception {
    if (!(messages.take() instanceof byte[] bytes)) throw new IllegalStateException("the connection is lost");
    var frame = MessagePack.newDefaultUnpacker(bytes).unpackValue().asMapValue().map();
    if (frame.get(value("type")).equals(value("error"))) throw new IllegalStateException(frame.toString());
    return frame;
  }

  void train(String url) throws Exception {
    socket = HttpClient.newHttpClient().newWebSocketBuilder().buildAsync(URI.create(url + "/v1/stream"), this).join();
    var group = map("name", "all", "algorithm", "muon", "lr", 0.05, "weight_decay", 0.0);
    var parameter = map("name", "w", "shape", newArray(value(OUTPUTS), value(INPUTS)), "group", "all");
    send("type", "open", "protocol", 1, "run", "java-" + ProcessHandle.current().pid(), "mode", "create",
        "groups", newArray(group), "parameters", newArray(parameter));
    int chunkBytes = next().get(value("limits")).asMapValue().map().get(value("chunk_bytes")).asIntegerValue().asInt();
    var random = new Random(1);
    float[] weights = new float[OUTPUTS * INPUTS], target = new float[OUTPUTS * INPUTS]; // y = target · x is learned
    for (int i = 0; i < target.length; i++) target[i] = random.nextFloat() - 0.5f;
    float largest = 0, loss = 0;
    for (int step = 1; step <= STEPS; step++, largest = Math.max(largest, loss)) {
      var gradient = ByteBuffer.allocate(4 * weights.length).order(ByteOrder.LITTLE_ENDIAN);
      loss = 0;
      for (int n = 0; n < SAMPLES; n++) { // each sample has one feature
        float x = random.nextFloat() * 2 - 1;
        for (int at = random.nextInt(INPUTS); at < weights.length; at += INPUTS) {
          float wrong = (weights[at] - target[at]) * x;
          gradient.putFloat(4 * at, gradient.getFloat(4 * at) + wrong * x / SAMPLES);
          loss += wrong * wrong / 2 / SAMPLES;
        }
      }
      System.out.printf("step %d: loss %.5f%n", step, loss);
      for (int at = 0; at < gradient.capacity(); at += chunkBytes) {
        byte[] data = Arrays.copyOfRange(gradient.array(), at, Math.min(at + chunkBytes, gradient.capacity()));
        send("type", "gradient", "parameter", 0, "step", step, "offset", at, "data", data);
      }
      send("type", "end", "step", step);
      var update = ByteBuffer.allocate(gradient.capacity()).order(ByteOrder.LITTLE_ENDIAN);
      float scale = 0, keep = 0;
      for (var frame = next(); !frame.get(value("type")).equals(value("receipt")); frame = next()) {
        if (frame.containsKey(value("data"))) update.put(frame.get(value("data")).asRawValue().asByteArray());
        if (!frame.containsKey(value("scale"))) continue; // only the first chunk has the factors
        scale = (float) frame.get(value("scale")).asNumberValue().toDouble();
        keep = (float) (1 - frame.get(value("decay")).asNumberValue().toDouble());
      }
      for (int i = 0; i < weights.length; i++) weights[i] = keep * weights[i] + scale * update.getFloat(4 * i);
    }
    socket.sendClose(WebSocket.NORMAL_CLOSURE, "").join();
    if (loss > largest / 4) throw new IllegalStateException("the loss did not fall");
  }

  public static void main(String[] args) throws Exception { new Trainer().train(args[0]); }
}
