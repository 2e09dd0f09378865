import { createServer } from 'node:net'

/** A raw TCP echo server as one writes it in Node. bench.ts starts it and is sent its port. */
const server = createServer({ noDelay: true }, (socket) => {
  socket.on('error', () => socket.destroy())
  socket.pipe(socket)
})
server.listen(0, '127.0.0.1', () => process.send?.(server.address()))
