// A linear model that muond trains: trainer 127.0.0.1 8787
// g++ -std=c++17 -O2 -ffp-contract=off trainer.cpp -o trainer -pthread   (Debian: libboost-dev, libmsgpack-cxx-dev)
#define MSGPACK_NO_BOOST
#include <unistd.h>
#include <boost/asio/connect.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/websocket.hpp>
#include <iostream>
#include <msgpack.hpp>
#include <random>
namespace asio = boost::asio;
constexpr int OUTPUTS = 8, INPUTS = 16, SAMPLES = 64, STEPS = 40, ELEMENTS = OUTPUTS * INPUTS;
using Text = std::string;
using Frame = std::map<Text, msgpack::object>;
using Stream = boost::beast::websocket::stream<asio::ip::tcp::socket>;

struct Group {
  Text name = "all", algorithm = "muon"; double lr = 0.05, weight_decay = 0;
  MSGPACK_DEFINE_MAP(name, algorithm, lr, weight_decay) };
struct Parameter {
  Text name = "w", group = "all"; std::vector<int> shape = {OUTPUTS, INPUTS};
  MSGPACK_DEFINE_MAP(name, group, shape) };
struct Open {
  Text type = "open", run = "cpp-" + std::to_string(getpid()), mode = "create"; int protocol = 1;
  std::vector<Group> groups{1}; std::vector<Parameter> parameters{1};
  MSGPACK_DEFINE_MAP(type, run, mode, protocol, groups, parameters) };
struct Gradient {  // the vector is packed as a bin
  Text type; int parameter, step, offset; std::vector<char> data;
  MSGPACK_DEFINE_MAP(type, parameter, step, offset, data) };
struct End { Text type; int step; MSGPACK_DEFINE_MAP(type, step) };
template <typename T>
void send(Stream& stream, const T& frame) {
  msgpack::sbuffer message;
  msgpack::pack(message, frame);
  stream.write(asio::buffer(message.data(), message.size()));
}

Frame next(Stream& stream, msgpack::object_handle& handle) {  // the values lie in `handle`
  boost::beast::flat_buffer message;
  stream.read(message);
  handle = msgpack::unpack(static_cast<const char*>(message.data().data()), message.size());
  Frame frame = handle.get().as<Frame>();
  if (frame["type"].as<Text>() == "error") throw std::runtime_error(frame["message"].as<Text>());
  return frame;
}

int main(int, char** arguments) {
  asio::io_context context;
  Stream stream(context);
  asio::connect(stream.next_layer(), asio::ip::tcp::resolver(context).resolve(arguments[1], arguments[2]));
  stream.handshake(Text(arguments[1]) + ":" + arguments[2], "/v1/stream");
  stream.binary(true);  // Beast sends text otherwise
  msgpack::object_handle handle;
  send(stream, Open());
  const size_t chunk_bytes = next(stream, handle)["limits"].as<Frame>()["chunk_bytes"].as<size_t>();
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> weights(ELEMENTS), target(ELEMENTS);  // y = target · x is learned
  for (float& value : target) value = uniform(random);
  float largest = 0, loss = 0;
  for (int step = 1; step <= STEPS; step++, largest = std::max(largest, loss)) {
    std::vector<float> gradient(ELEMENTS);
    loss = 0;
    for (int n = 0; n < SAMPLES; n++) {  // each sample has one feature
      const float x = uniform(random);
      for (int at = random() % INPUTS; at < ELEMENTS; at += INPUTS) {
        const float wrong = (weights[at] - target[at]) * x;
        gradient[at] += wrong * x / SAMPLES;
        loss += wrong * wrong / 2 / SAMPLES;
      }
    }
    std::cout << "step " << step << ": loss " << loss << std::endl;
    const char* bytes = reinterpret_cast<const char*>(gradient.data());  // of a little-endian machine
    for (size_t at = 0, all = 4 * ELEMENTS; at < all; at += chunk_bytes)
      send(stream, Gradient{"gradient", 0, step, int(at), {bytes + at, bytes + std::min(at + chunk_bytes, all)}});
    send(stream, End{"end", step});
    std::vector<char> update;
    float scale = 0, keep = 0;
    for (Frame frame = next(stream, handle); frame["type"].as<Text>() != "receipt"; frame = next(stream, handle)) {
      if (frame["type"].as<Text>() != "update") continue;
      for (char byte : frame["data"].as<std::vector<char>>()) update.push_back(byte);
      if (!frame.count("scale")) continue;  // only the first chunk has the factors
      scale = frame["scale"].as<double>(), keep = 1 - frame["decay"].as<double>();
    }
    const float* data = reinterpret_cast<const float*>(update.data());
    for (int i = 0; i < ELEMENTS; i++) weights[i] = keep * weights[i] + scale * data[i];
  }
  stream.close(boost::beast::websocket::close_code::normal);
  if (loss > largest / 4) throw std::runtime_error("the loss did not fall");
}
