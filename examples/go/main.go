// A linear model that muond trains: go run . ws://127.0.0.1:8787
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"github.com/gorilla/websocket"
	"github.com/vmihailenco/msgpack/v5"
	"log"
	"math/rand"
	"os"
)

const outputs, inputs, samples, steps = 8, 16, 64, 40

type keys = map[string]any
type matrix [outputs * inputs]float32 // Rows first.
type frame struct {                   // What is needed of the service's frames: other keys are ignored.
	Type   string         `msgpack:"type"`
	Text   string         `msgpack:"message"`
	Scale  float64        `msgpack:"scale"`
	Decay  float64        `msgpack:"decay"`
	Data   []byte         `msgpack:"data"`
	Limits map[string]int `msgpack:"limits"`
}

var socket *websocket.Conn

func send(f keys) {
	message, _ := msgpack.Marshal(f)
	socket.WriteMessage(websocket.BinaryMessage, message) // next finds that the connection is lost.
}

func next() (f frame) {
	_, message, err := socket.ReadMessage()
	if err = errors.Join(err, msgpack.Unmarshal(message, &f)); err != nil || f.Type == "error" {
		log.Fatal(err, f.Text)
	}
	return f
}

func main() {
	var err error
	if socket, _, err = websocket.DefaultDialer.Dial(os.Args[1]+"/v1/stream", nil); err != nil {
		log.Fatal(err)
	}
	send(keys{"type": "open", "protocol": 1, "run": fmt.Sprint("go-", os.Getpid()), "mode": "create",
		"groups":     []keys{{"name": "all", "algorithm": "muon", "lr": 0.05, "weight_decay": 0.0}},
		"parameters": []keys{{"name": "w", "shape": []int{outputs, inputs}, "group": "all"}}})
	chunkBytes := next().Limits["chunk_bytes"]
	var weights, target, data matrix // What is learned is y = target · x.
	for i := range target {
		target[i] = rand.Float32() - 0.5
	}
	var largest, loss float32
	for step := 1; step <= steps; step++ {
		var gradient matrix
		largest, loss = max(largest, loss), 0
		for n := 0; n < samples; n++ { // Each sample has one feature.
			feature, x := rand.Intn(inputs), rand.Float32()*2-1
			for at := feature; at < len(weights); at += inputs {
				wrong := (weights[at] - target[at]) * x
				gradient[at] += wrong * x / samples
				loss += wrong * wrong / 2 / samples
			}
		}
		fmt.Printf("step %d: loss %.5f\n", step, loss)
		var rest, update bytes.Buffer
		binary.Write(&rest, binary.LittleEndian, &gradient)
		for at := 0; rest.Len() > 0; at += chunkBytes {
			send(keys{"type": "gradient", "parameter": 0, "step": step, "offset": at, "data": rest.Next(chunkBytes)})
		}
		send(keys{"type": "end", "step": step})
		var scale, decay float64 // Only the first chunk has them, the others have 0.
		for f := next(); f.Type != "receipt"; f = next() {
			update.Write(f.Data)
			scale, decay = scale+f.Scale, decay+f.Decay
		}
		binary.Read(&update, binary.LittleEndian, &data)
		for i := range weights { // The conversions keep products and sum from being fused.
			weights[i] = float32(float32(1-decay)*weights[i]) + float32(float32(scale)*data[i])
		}
	}
	socket.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
	if loss > largest/4 {
		log.Fatal("the loss did not fall")
	}
}
