import { writeFile } from 'node:fs/promises'

/** Writes a configuration of Kubernetes' clients, JSON, which is YAML; answers its path. */
export async function writeKubeconfig(path: string, to: { port: number; ca: string; token: string }): Promise<string> {
  const content = {
    ...{ apiVersion: 'v1', kind: 'Config', 'current-context': 'test' },
    clusters: [{ name: 'test', cluster: { server: `https://127.0.0.1:${to.port}`, 'certificate-authority': to.ca } }],
    users: [{ name: 'test', user: { token: to.token } }],
    contexts: [{ name: 'test', context: { cluster: 'test', user: 'test' } }],
  }
  await writeFile(path, JSON.stringify(content))
  return path
}
