import { errorText } from '../../errors.js'
import { count, type Rule, record, text } from '../../store/rules.js'
import type { Announcement } from './registry.js'

const announcementRule: Rule<Announcement> = record<Announcement>({
  url: text('a url', /^https?:\/\//),
  incarnation: text(),
  free_bytes: count,
  device: text(),
})

/**
 * The announcement that fields have; others are left out, as a process of a newer version may say more of itself.
 * Throws where one lacks or is wrong, with the place that they were read from.
 */
export function announcementOf(fields: Record<string, unknown>, where: string): Announcement {
  const { url, incarnation, free_bytes, device } = fields
  const announcement = { url, incarnation, free_bytes, device }
  const problem = announcementRule.problem(announcement, '')
  if (problem !== undefined) throw new Error(`${where} is no announcement of a process: ${problem}`)
  return announcement as Announcement
}

/** The announcement that JSON has. Throws as `announcementOf`. */
export function readAnnouncement(content: string, where: string): Announcement {
  return announcementOf(fieldsOf(content, where), where)
}

function fieldsOf(content: string, where: string): Record<string, unknown> {
  try {
    return { ...JSON.parse(content) }
  } catch (error) {
    throw new Error(`${where} is no announcement of a process: ${errorText(error)}`)
  }
}
